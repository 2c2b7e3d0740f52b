"""What the code of `thin`'s kernels has in common: one thread's instructions, in PTX.

A warpgroup owns 128 features of one group, an item, and passes over the group's rows 8 or 16 at a time.
The matrix instruction is `mma.m16n8k16`: thread `4 c + t` of a warp (c < 8, t < 4) holds, of the
weight, for contracted slots 2t, 2t + 1 and 2t + 8, 2t + 9, features c and c + 8; of the rows, the same
slots of row c; of the product, rows 2t, 2t + 1 of features c and c + 8. Which contracted index stands
in which slot is free where weight and rows agree, and which feature in which place too: see
`thin_by_row` and `thin_by_column`. int4 to bf16 is as in `fragments`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

FEATURES = 128  # of a warpgroup
TILE = 8  # rows of a matrix instruction
WARPS = 4
THREADS = 32 * WARPS  # of a warpgroup
STEP = 128  # of the contraction, for all warps together
TWICE_136 = 0x43084308  # bf16
FIRST_BARRIER = 8  # named ones that Mosaic's own (0, warpgroup + 1) leave free
MEET = "bar.sync meeting, 128;"
# Operands of the assembly, in this order.
SIZES, LAYER, X, VALUES, SCALE, Y, MEMORY, ITEM, THREAD = (f"${n}" for n in range(9))
CONSTRAINTS = "l,l,l,l,l,l,r,r,r"


@dataclass(frozen=True)
class Shape:
    """What the code is specialised for. Weights are [groups, out, in].

    by_row: contracting `in`, otherwise `out`. tiles: of 8 rows at a time, 1 or 2. depth: steps whose
    weights are in use or on their way. warpgroups: of a block. memory: bytes of each.
    """

    groups: int
    out: int
    width_in: int
    by_row: bool
    tiles: int
    depth: int
    warpgroups: int
    blocks: int
    memory: int

    @property
    def contraction(self) -> int:
        """Length of what is summed over."""
        return self.width_in if self.by_row else self.out

    @property
    def features(self) -> int:
        """Width of the product."""
        return self.out if self.by_row else self.width_in

    @property
    def steps(self) -> int:
        """Of the contraction."""
        return self.contraction // STEP

    @property
    def workers(self) -> int:
        """Warpgroups of all blocks."""
        return self.warpgroups * self.blocks

    @property
    def items(self) -> int:
        """Blocks of features of all groups: what the warpgroups share out."""
        return self.groups * self.features // FEATURES


class Code:
    """Lines of PTX and the registers they use."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.registers: dict[str, str] = {}

    def emit(self, *lines: str) -> None:
        """Adds instructions."""
        self.lines += lines

    def new(self, kind: str, *names: str) -> None:
        """Declares registers that may have been declared before."""
        self.registers |= dict.fromkeys(names, kind)

    def text(self) -> str:
        """One scope of assembly."""
        declared = [f".reg .{kind} {name};" for name, kind in self.registers.items()]
        return "{ " + "\n".join(declared + self.lines) + " }"


def find_place(code: Code, shape: Shape) -> None:
    """Where this thread stands in its warpgroup, and the warpgroup's shared memory."""
    code.new("b32", "mine", "lane", "warp", "c", "t", "meeting", "memory", "bias", "n")
    code.emit(
        f"and.b32 mine, {THREAD}, {THREADS - 1};",
        "and.b32 lane, mine, 31;",
        "shr.u32 warp, mine, 5;",
        "shr.u32 c, lane, 2;",
        "and.b32 t, lane, 3;",
        f"shr.u32 meeting, {THREAD}, 7;",
        f"mad.lo.u32 memory, meeting, {shape.memory}, {MEMORY};",
        f"add.u32 meeting, meeting, {FIRST_BARRIER};",
        f"mov.b32 bias, {TWICE_136:#x};",
    )


def find_group(
    code: Code, shape: Shape, item: str, names: tuple[str, str], none: str, label: str
) -> None:
    """`group` and `block` of features of an item, and `of_all`, the group's place among all layers'.

    Args:
        code: is added to.
        shape: of the operands.
        item: register.
        names: registers for the group's first row, and for how many it has.
        none: where to go if it has none.
        label: unlike others.
    """
    first, left = names
    blocks = shape.features // FEATURES
    code.new("b32", "group", "block", "of_all", "other", first, left)
    code.new("b64", "address", "offset")
    code.new("pred", "before", "more", "empty")
    code.emit(
        f"div.u32 group, {item}, {blocks};",
        f"rem.u32 block, {item}, {blocks};",
        f"mad.wide.u32 address, group, 4, {SIZES};",
        f"ld.global.nc.u32 {left}, [address];",
        f"setp.eq.u32 empty, {left}, 0;",
        f"@empty bra {none};",
        f"ld.global.nc.u32 of_all, [{LAYER}];",
        f"mov.u32 {first}, 0;",
        "mov.u32 n, lane;",
        f"mad.wide.u32 address, lane, 4, {SIZES};",
        f"{label}_COUNT:",
        "setp.lt.u32 before, n, group;",
        "mov.u32 other, 0;",
        "@before ld.global.nc.u32 other, [address];",
        f"add.u32 {first}, {first}, other;",
        "add.u32 n, n, 32;",
        "add.u64 address, address, 128;",
        "sub.u32 other, n, lane;",
        "setp.lt.u32 more, other, group;",  # the same in all lanes
        f"@more bra {label}_COUNT;",
        f"redux.sync.add.s32 {first}, {first}, 0xffffffff;",
        f"mad.lo.u32 of_all, of_all, {shape.groups}, group;",
    )


def point_at_row(
    code: Code, shape: Shape, name: str, row: tuple[str, int], names: tuple[str, str]
) -> None:
    """{name} = x + `in_row` bytes + a row of those that are left, or the last of them.

    Args:
        code: is added to.
        shape: of the operands.
        name: register.
        row: a register plus a constant.
        names: registers of the first row and of how many are left.
    """
    first, left = names
    code.new("b64", name)
    code.new("b32", "last_row")
    code.emit(
        f"add.u32 n, {row[0]}, {row[1]};",
        f"sub.s32 last_row, {left}, 1;",
        "min.s32 n, n, last_row;",
        f"add.u32 n, n, {first};",
        f"mad.wide.u32 {name}, n, {2 * shape.contraction}, {X};",
        f"add.u64 {name}, {name}, in_row;",
    )


def point_at_product(code: Code, shape: Shape) -> None:
    """`product`: the thread's first row, `out_offset` bytes in; `other`: rows left from there."""
    code.new("b64", "product")
    code.new("pred", "exists")
    code.emit(
        "shl.b32 n, t, 1;",
        "sub.s32 other, left, n;",
        "add.u32 n, n, first;",
        f"mad.wide.u32 product, n, {2 * shape.features}, {Y};",
        "cvt.u64.u32 offset, out_offset;",
        "add.u64 product, product, offset;",
    )


def decode(code: Code, pair: str, scale: str) -> None:
    """Two nibbles in the low bits of the halves of `pair` to bf16 values."""
    code.emit(
        f"lop3.b32 {pair}, {pair}, 0x000F000F, {TWICE_136:#x}, 0x6A;",  # (x & a) ^ b
        f"sub.rn.bf16x2 {pair}, {pair}, bias;",
        f"mul.rn.bf16x2 {pair}, {pair}, {scale};",
    )


def mma(code: Code, sums: str, weight: list[str], rows: list[str]) -> None:
    """sums += weight · rows, the sums being four registers that begin with a name."""
    acc = ", ".join(f"{sums}_{e}" for e in range(4))
    code.emit(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        f"{{{acc}}}, {{{', '.join(weight)}}}, {{{', '.join(rows)}}}, {{{acc}}};"
    )


def zero(code: Code, names: Iterator[str]) -> None:
    """Starts sums."""
    for name in names:
        code.new("f32", name)
        code.emit(f"mov.f32 {name}, 0f00000000;")


def load(code: Code, names: list[str], space: str, source: str, condition: str = "") -> None:
    """Consecutive words."""
    code.new("b32", *names)
    code.emit(f"{condition}ld.{space}.v{len(names)}.b32 {{{', '.join(names)}}}, [{source}];")
