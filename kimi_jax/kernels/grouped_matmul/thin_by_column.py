"""`thin`'s product in the order BY_COLUMN.

A step is 32 of the contraction for each warp; all four have the same 128 features, and their sums are
added at the end, in the warps' order. Thread (c, t) has features 16 c to 16 c + 15 of 8 contracted
rows from 8 t; the same nibble of two neighbouring rows is a pair.

Weights go from global memory to registers, some steps ahead of their use. (Through a ring in shared
memory, as BY_ROW, they were slower; LOG.md.)
"""

from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.kernels.grouped_matmul.thin_code import (
    FEATURES,
    ITEM,
    MEET,
    SCALE,
    STEP,
    TILE,
    VALUES,
    WARPS,
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

WARPGROUPS = 3  # of a block: ptxas gives a thread at most 65,536 / 128 / warpgroups registers
DEPTH = {1: 3, 2: 2}  # by tiles: as many as registers hold
LOAD_WEIGHT = "global.nc.L1::no_allocate.L2::128B"


def plan(groups: int, out: int, width_in: int, tiles: int, blocks: int) -> Shape:
    """For as many steps in flight as registers hold."""
    memory = WARPS * FEATURES * TILE * tiles * 4  # the warps' sums
    depth = min(DEPTH[tiles], out // STEP)
    return Shape(groups, out, width_in, False, tiles, depth, WARPGROUPS, blocks, memory)


def product(shape: Shape) -> str:
    """The whole of it."""
    return _Kernel(shape).text()


class _Kernel:
    """Its parts."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.code = shape, Code()
        self.pitch = shape.width_in // 2

    def text(self) -> str:
        """All parts in order."""
        code, shape = self.code, self.shape
        code.new("b32", "item", "step")
        code.new("pred", "last", "ahead")
        code.emit(f"mov.u32 item, {ITEM};")
        find_place(code, shape)
        code.emit("NEXT_ITEM:")
        find_group(code, shape, "item", ("first", "left"), "ITEM_DONE", "ITEM")
        self.point()
        code.emit("NEXT_ROWS:")
        self.begin()
        code.emit("mov.u32 step, 0;", "NEXT_STEP:")
        for buffer in range(shape.depth):
            self.multiply(buffer)
            code.emit(
                "add.u32 step, step, 1;",
                f"setp.eq.u32 last, step, {shape.steps};",
                "@last bra SUMMED;",
            )
        code.emit("bra NEXT_STEP;", "SUMMED:")
        self.store()
        rows = TILE * shape.tiles
        code.emit(
            f"add.u32 first, first, {rows};",
            f"sub.s32 left, left, {rows};",
            "setp.gt.s32 more, left, 0;",
            MEET,  # shared memory is free again
            "@more bra NEXT_ROWS;",
            "ITEM_DONE:",
            f"add.u32 item, item, {shape.workers};",
            f"setp.lt.u32 more, item, {shape.items};",
            "@more bra NEXT_ITEM;",
        )
        return code.text()

    def point(self) -> None:
        """Where this thread's weights, scales, rows and products are."""
        code = self.code
        code.new("b32", "contracted", "to_memory", "in_memory", "out_offset")
        code.new("b64", "first_weight", "first_scale", "in_row")
        code.emit(
            "shl.b32 contracted, warp, 5;",
            "mad.lo.u32 contracted, t, 8, contracted;",
            f"mad.lo.u32 n, of_all, {self.shape.out}, contracted;",
            f"mad.wide.u32 first_weight, n, {self.pitch}, {VALUES};",
            "shl.b32 n, block, 6;",
            "mad.lo.u32 n, c, 8, n;",
            "cvt.u64.u32 offset, n;",
            "add.u64 first_weight, first_weight, offset;",
            "mul.wide.u32 in_row, contracted, 2;",
            "shr.u32 n, c, 1;",
            "mad.lo.u32 n, block, 4, n;",
            f"mad.lo.u32 n, of_all, {self.shape.width_in // GROUP_SIZE}, n;",
            f"mad.wide.u32 first_scale, n, {2 * self.shape.out}, {SCALE};",
            "add.u64 first_scale, first_scale, in_row;",
            # 4 features a thread at the end: 16 c + 4 warp and up.
            "shl.b32 n, block, 7;",
            "mad.lo.u32 n, c, 16, n;",
            "mad.lo.u32 n, warp, 4, n;",
            "shl.b32 out_offset, n, 1;",
            "mad.lo.u32 in_memory, lane, 4, memory;",
            f"mad.lo.u32 to_memory, warp, {self.shape.memory // WARPS}, in_memory;",
            f"mad.lo.u32 in_memory, warp, {self.shape.memory // WARPS**2}, in_memory;",
        )

    def begin(self) -> None:
        """Starts a pass: sums, and the first steps' weights and rows."""
        code = self.code
        code.new("b64", "weight", "scale")
        zero(
            code,
            (f"s{u}{n}_{e}" for u in range(8) for n in range(self.shape.tiles) for e in range(4)),
        )
        code.emit("mov.b64 weight, first_weight;", "mov.b64 scale, first_scale;")
        for n in range(self.shape.tiles):
            point_at_row(code, self.shape, f"row{n}", ("c", TILE * n), ("first", "left"))
        for buffer in range(self.shape.depth):
            self.load(buffer, "")

    def load(self, buffer: int, condition: str) -> None:
        """Asks for a step's weights, scales and rows."""
        code = self.code
        for i in range(8):
            names = [f"w{buffer}{i}{h}" for h in range(2)]
            load(code, names, LOAD_WEIGHT, f"weight + {i * self.pitch}", condition)
        load(code, [f"scale{buffer}{i}" for i in range(4)], "global.nc", "scale", condition)
        code.emit(
            f"add.u64 weight, weight, {STEP * self.pitch};",
            f"add.u64 scale, scale, {2 * STEP};",
        )
        for n in range(self.shape.tiles):
            names = [f"x{buffer}{n}{i}" for i in range(4)]
            load(code, names, "global.nc", f"row{n}", condition)
            code.emit(f"add.u64 row{n}, row{n}, {2 * STEP};")

    def multiply(self, buffer: int) -> None:
        """One step of a warp: 32 contracted rows of the weight."""
        code = self.code
        pairs = [f"a{nibble}{pair}" for nibble in range(8) for pair in range(2)]
        code.new("b32", "low", "high", *pairs)
        for half in range(2):  # 16 of the 32: rows 8 t + 4 · half and up
            for word in range(2):  # 8 of the thread's 16 features
                for pair in range(2):
                    row = 4 * half + 2 * pair
                    two = f"w{buffer}{row}{word}, w{buffer}{row + 1}{word}"
                    code.emit(f"prmt.b32 low, {two}, 0x5410;", f"prmt.b32 high, {two}, 0x7632;")
                    for nibble in range(8):
                        source = "low" if nibble < 4 else "high"
                        code.emit(f"shr.u32 a{nibble}{pair}, {source}, {4 * (nibble % 4)};")
                        decode(code, f"a{nibble}{pair}", f"scale{buffer}{2 * half + pair}")
                for v in range(4):
                    weight = [f"a{2 * v + i}{pair}" for pair in range(2) for i in range(2)]
                    for n in range(self.shape.tiles):
                        rows = [f"x{buffer}{n}{2 * half + pair}" for pair in range(2)]
                        mma(code, f"s{4 * word + v}{n}", weight, rows)
        code.emit(f"setp.lt.s32 ahead, step, {self.shape.steps - self.shape.depth};")
        self.load(buffer, "@ahead ")

    def store(self) -> None:
        """Adds the warps' sums in shared memory; each stores a quarter of the features."""
        code = self.code
        pitch = 2 * self.shape.width_in
        code.new("b32", "word0", "word1")
        code.new("f32", "more0")
        sums = [f"s{u}{n}_{e}" for u in range(8) for n in range(self.shape.tiles) for e in range(4)]
        for place, name in enumerate(sums):
            code.emit(f"st.shared.f32 [to_memory + {128 * place}], {name};")
        code.emit(MEET)
        for place, name in enumerate(sums[: len(sums) // WARPS]):
            code.emit(f"ld.shared.f32 {name}, [in_memory + {128 * place}];")
            for warp in range(1, WARPS):
                at = self.shape.memory // WARPS * warp + 128 * place
                code.emit(f"ld.shared.f32 more0, [in_memory + {at}];")
                code.emit(f"add.f32 {name}, {name}, more0;")
        point_at_product(code, self.shape)
        for n in range(self.shape.tiles):
            for e in range(2):
                code.emit(
                    f"setp.gt.s32 exists, other, {8 * n + e};",
                    f"cvt.rn.bf16x2.f32 word0, s0{n}_{e + 2}, s0{n}_{e};",
                    f"cvt.rn.bf16x2.f32 word1, s1{n}_{e + 2}, s1{n}_{e};",
                    f"@exists st.global.v2.b32 [product + {(8 * n + e) * pitch}], {{word0, word1}};",
                )
