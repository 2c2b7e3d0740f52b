"""`thin`'s product in the order BY_ROW.

A step is 128 of the contraction. A warp has 32 features, thread (c, t) the 32 values from 32 t of
features 2c and 2c + 1 of each 16: whole groups of one scale. Nibbles j and j + 4 of a word are a pair;
rows are put into shared memory with their values in that order, for all four warps.

Weights are copied to a ring in shared memory some steps ahead of their use, also across passes and
items, each thread's by the thread itself, so that no barrier guards them: registers could not hold as
many on their way.
"""

from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.kernels.grouped_matmul.thin_code import (
    FEATURES,
    ITEM,
    MEET,
    SCALE,
    STEP,
    THREADS,
    TILE,
    VALUES,
    Code,
    Shape,
    decode,
    find_group,
    find_place,
    load,
    mma,
    point_at_product,
    point_at_row,
    zero,
)

SLOT = THREADS * (64 + 8)  # bytes of the ring for a step's weights and scales
WARPGROUPS = (4, 3)  # of a block: as many as registers allow
MEMORY = 220 * 1024  # bytes of shared memory, of the 227 KiB of a multiprocessor
DEEPEST = 8


def plan(groups: int, out: int, width_in: int, tiles: int, blocks: int) -> Shape:
    """For so many warpgroups a block that the least time is lost when the last items run out."""
    items = groups * out // FEATURES

    def lost(warpgroups: int) -> float:
        workers = blocks * warpgroups
        return -(-items // workers) * workers / items

    warpgroups = min(WARPGROUPS, key=lost)
    rows = 2 * _step_of_rows(tiles)
    depth = min((MEMORY // warpgroups - rows) // SLOT, DEEPEST, width_in // STEP)
    memory = depth * SLOT + rows
    return Shape(groups, out, width_in, True, tiles, depth, warpgroups, blocks, memory)


def _step_of_rows(tiles: int) -> int:
    """Bytes of shared memory."""
    return TILE * tiles * STEP * 2


def product(shape: Shape) -> str:
    """The whole of it.

    What is copied is ahead of what is computed; registers named `next_…` describe the pass after the
    one that is computed, and `weight`, `scale`, `row…` are where copies come from.
    """
    assert 2 <= shape.depth <= shape.steps, f"{shape.depth} of {shape.steps} steps"
    return _Kernel(shape).text()


class _Kernel:
    """Its parts."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.code = shape, Code()
        self.pitch = shape.width_in // 2
        self.scale_pitch = 2 * shape.out

    def text(self) -> str:
        """All parts in order."""
        code, shape = self.code, self.shape
        find_place(code, shape)
        self.point()
        self.find_next("FIRST")
        code.new("b32", "step")
        code.new("pred", "last", "ahead", "alive")
        code.emit("@!valid bra END;", "mov.pred alive, valid;")
        self.follow("")
        for _ in range(shape.depth - 1):
            self.copy()
        for n in range(shape.tiles):
            code.emit(f"mov.b64 row{n}, next_row{n};")
        self.load_rows("")
        code.emit("NEXT_PASS:")
        for name in ("item", "first", "left", "out_offset"):
            code.emit(f"mov.b32 {name}, next_{name};")
        sums = (f"s{m}{n}_{e}" for m in range(2) for n in range(shape.tiles) for e in range(4))
        zero(code, sums)
        self.find_next("AFTER")
        code.emit("mov.u32 step, 0;", "NEXT_STEP:")
        # From here on, copies are the next pass's.
        code.emit(f"setp.eq.u32 last, step, {shape.steps - shape.depth + 1};")
        self.follow("@last ")
        code.emit("@last mov.pred alive, valid;")
        self.copy()
        code.emit(f"cp.async.wait_group {shape.depth - 1};")
        self.multiply()
        self.advance("used")
        code.emit(
            "add.u32 step, step, 1;",
            f"setp.lt.u32 more, step, {shape.steps};",
            "@more bra NEXT_STEP;",
        )
        self.store()
        code.emit("@valid bra NEXT_PASS;", "END:", "cp.async.wait_all;")
        return code.text()

    def point(self) -> None:
        """What does not change: where in a row, and where in shared memory."""
        code, shape = self.code, self.shape
        code.new("b32", "tile_row", "to_rows", "flip", *(f"from_rows{q}" for q in range(4)))
        code.new("b32", "ring", "ring_end", "used", "filled", "place", "item", "first", "left")
        code.new("b32", "out_offset", "next_out_offset", "next_item")
        code.new("b64", "in_row", "weight", "scale", "next_weight", "next_scale")
        code.emit(
            "mov.u32 ring, memory;",
            f"add.u32 ring_end, ring, {shape.depth * SLOT};",
            "mov.u32 used, ring;",
            "mov.u32 filled, ring;",
            f"sub.s32 item, {ITEM}, {shape.workers};",
            "mov.u32 first, 0;",
            "mov.u32 left, 0;",
            # 16 threads copy a row: thread u of them the 8 values of thread t = u / 4, word q = u % 4.
            "shr.u32 tile_row, mine, 4;",
            "and.b32 n, mine, 15;",
            "mul.wide.u32 in_row, n, 16;",
            # In units of 16 bytes: 32 q + (4 · row + t) ^ 2 q, which spreads both ways over the banks.
            "and.b32 to_rows, n, 3;",
            "shr.u32 n, n, 2;",
            "mad.lo.u32 n, tile_row, 4, n;",
            "shl.b32 flip, to_rows, 1;",
            "xor.b32 n, n, flip;",
            "mad.lo.u32 n, to_rows, 32, n;",
            "mad.lo.u32 to_rows, n, 16, ring_end;",
            "mov.u32 flip, 0;",
        )
        for q in range(4):
            code.emit(
                f"xor.b32 n, lane, {2 * q};",
                f"mad.lo.u32 from_rows{q}, n, 16, ring_end;",
                f"add.u32 from_rows{q}, from_rows{q}, {512 * q};",
            )

    def find_next(self, label: str) -> None:
        """The pass after the one of `item`, `first`, `left`: more rows of it, or another group's.

        Sets `valid` if there is one, and then what begins with `next_`.
        """
        code, shape = self.code, self.shape
        rows = TILE * shape.tiles
        code.new("pred", "valid")
        code.new("b32", "next_first", "next_left")
        code.emit(
            "mov.u32 next_item, item;",
            f"add.u32 next_first, first, {rows};",
            f"sub.s32 next_left, left, {rows};",
            "setp.gt.s32 valid, next_left, 0;",
            f"@valid bra {label}_FOUND;",
            f"{label}_SEARCH:",
            f"add.s32 next_item, next_item, {shape.workers};",
            f"setp.lt.s32 valid, next_item, {shape.items};",
            f"@!valid bra {label}_DONE;",
        )
        names = ("next_first", "next_left")
        find_group(code, shape, "next_item", names, f"{label}_SEARCH", label)
        self.point_at_next()
        code.emit(f"{label}_FOUND:")
        for n in range(shape.tiles):
            code.new("b64", f"row{n}")
            point_at_row(code, shape, f"next_row{n}", ("tile_row", TILE * n), names)
        code.emit(f"{label}_DONE:")

    def point_at_next(self) -> None:
        """Where this thread's weights and scales are, and its products."""
        code = self.code
        code.emit(
            "shl.b32 n, block, 7;",
            "mad.lo.u32 n, warp, 32, n;",
            "mad.lo.u32 n, c, 2, n;",  # feature
            "shl.b32 next_out_offset, n, 1;",
            f"mad.lo.u32 n, of_all, {self.shape.out}, n;",
            f"mad.wide.u32 next_weight, n, {self.pitch}, {VALUES};",
            "mul.wide.u32 offset, t, 16;",
            "add.u64 next_weight, next_weight, offset;",
            f"mad.lo.u32 n, of_all, {self.shape.width_in // GROUP_SIZE}, t;",
            f"mad.wide.u32 next_scale, n, {self.scale_pitch}, {SCALE};",
            "cvt.u64.u32 offset, next_out_offset;",
            "add.u64 next_scale, next_scale, offset;",
        )

    def follow(self, condition: str) -> None:
        """Lets copies come from the next pass."""
        for name in ("weight", "scale"):
            self.code.emit(f"{condition}mov.b64 {name}, next_{name};")

    def advance(self, place: str) -> None:
        """To the next slot of the ring."""
        self.code.new("pred", "over")
        self.code.emit(
            f"add.u32 {place}, {place}, {SLOT};",
            f"setp.eq.u32 over, {place}, ring_end;",
            f"@over mov.u32 {place}, ring;",
        )

    def copy(self) -> None:
        """Starts copying another step's weights and scales, if any are left."""
        code = self.code
        code.emit("mad.lo.u32 place, mine, 16, filled;")
        for at in range(4):
            row = 16 * (at // 2) + at % 2
            code.emit(
                "@alive cp.async.cg.shared.global.L2::128B "
                f"[place + {16 * THREADS * at}], [weight + {row * self.pitch}], 16;"
            )
        code.emit("mad.lo.u32 place, mine, 4, filled;")
        for m in range(2):
            code.emit(
                "@alive cp.async.ca.shared.global "
                f"[place + {64 * THREADS + 4 * THREADS * m}], [scale + {32 * m}], 4;"
            )
        code.emit(
            f"add.u64 weight, weight, {STEP // 2};",
            f"add.u64 scale, scale, {STEP // GROUP_SIZE * self.scale_pitch};",
            "cp.async.commit_group;",
        )
        self.advance("filled")

    def load_rows(self, condition: str) -> None:
        """Asks for a step's rows."""
        code = self.code
        for n in range(self.shape.tiles):
            load(code, [f"x{n}{i}" for i in range(4)], "global.nc", f"row{n}", condition)
            code.emit(f"add.u64 row{n}, row{n}, {2 * STEP};")

    def multiply(self) -> None:
        """One step: rows to shared memory, then weights times rows; asks for the next step's rows."""
        code = self.code
        code.emit("add.u32 place, to_rows, flip;")
        for n in range(self.shape.tiles):
            pairs = [f"p{i}" for i in range(4)]
            code.new("b32", *pairs)
            for i, pair in enumerate(pairs):
                pattern = "0x5410" if i % 2 == 0 else "0x7632"
                code.emit(f"prmt.b32 {pair}, x{n}{i // 2}, x{n}{i // 2 + 2}, {pattern};")
            code.emit(f"st.shared.v4.b32 [place + {2048 * n}], {{{', '.join(pairs)}}};")
        code.emit(MEET, f"setp.eq.u32 last, step, {self.shape.steps - 1};")
        for n in range(self.shape.tiles):
            code.emit(f"@last mov.b64 row{n}, next_row{n};")
        code.emit("not.pred ahead, last;", "or.pred ahead, ahead, valid;")
        self.load_rows("@ahead ")
        scales = [[f"d{m}{i}" for i in range(2)] for m in range(2)]
        code.emit("mad.lo.u32 place, mine, 4, used;")
        for m in range(2):
            name = f"scale{m}"
            code.new("b32", name, *scales[m])
            code.emit(f"ld.shared.b32 {name}, [place + {64 * THREADS + 4 * THREADS * m}];")
            for i, pattern in enumerate(("0x1010", "0x3232")):
                code.emit(f"prmt.b32 {scales[m][i]}, {name}, {name}, {pattern};")
        code.emit("mad.lo.u32 place, mine, 16, used;")
        for at in range(4):
            words = [f"w{at // 2}{at % 2}{q}" for q in range(4)]
            load(code, words, "shared", f"place + {16 * THREADS * at}")
        for q in range(4):
            self.multiply_word(q, scales)
        code.emit(f"xor.b32 flip, flip, {_step_of_rows(self.shape.tiles)};")

    def multiply_word(self, q: int, scales: list[list[str]]) -> None:
        """8 of each thread's 32 contracted values."""
        code = self.code
        rows = [[f"b{n}{i}" for i in range(4)] for n in range(self.shape.tiles)]
        code.emit(f"add.u32 place, from_rows{q}, flip;")
        for n in range(self.shape.tiles):
            load(code, rows[n], "shared", f"place + {2048 * n}")
        for m in range(2):
            for i in range(2):
                for j in range(4):
                    pair = f"a{i}{j}"
                    code.new("b32", pair)
                    code.emit(f"shr.u32 {pair}, w{m}{i}{q}, {4 * j};")
                    decode(code, pair, scales[m][i])
            for half in range(2):
                weight = [f"a{i}{2 * half + j}" for j in range(2) for i in range(2)]
                for n in range(self.shape.tiles):
                    mma(code, f"s{m}{n}", weight, rows[n][2 * half : 2 * half + 2])

    def store(self) -> None:
        """Sums to rows of the product, two features a word."""
        code = self.code
        pitch = 2 * self.shape.out
        code.new("b32", "word")
        point_at_product(code, self.shape)
        for n in range(self.shape.tiles):
            for e in range(2):
                code.emit(f"setp.gt.s32 exists, other, {8 * n + e};")
                for m in range(2):
                    sums = f"s{m}{n}"
                    code.emit(
                        f"cvt.rn.bf16x2.f32 word, {sums}_{e + 2}, {sums}_{e};",
                        f"@exists st.global.b32 [product + {(8 * n + e) * pitch + 32 * m}], word;",
                    )
