"""Lane by lane: what one thread of a warpgroup does in PTX, for `fragments`.

Written with MLIR values inside `plgpu.inline_mgpu`; the order of features is explained there.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

FEATURES = 128  # weight features of a block: 64 for each of two warpgroups
WARPGROUP_FEATURES = 64
CONTRACTION = 64  # of one pipeline step
# Staged output rows: 16 bytes of padding spread the rows over the shared-memory banks.
STAGE_PITCH = 2 * FEATURES + 16
STAGE_ROWS = 128  # staged at a time
STAGE_BARRIER = 8  # a named one that Mosaic's own (0, warpgroup + 1) leave free

A_LAYOUT = plgpu.Layout.WGMMA


def i32() -> ir.Type:
    """The 32-bit integer type."""
    return ir.IntegerType.get_signless(32)


def const(value: int) -> ir.Value:
    """A 32-bit constant."""
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value))


def shared_address(ref: ir.Value) -> ir.Value:
    """Of a reference to shared memory, as a 32-bit integer."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def global_pointer(ref: ir.Value) -> ir.Value:
    """Of a reference to global memory, as a 64-bit integer."""
    i64 = ir.IntegerType.get_signless(64)
    return llvm.ptrtoint(i64, utils.memref_ptr(ref))


def global_address(
    ref: ir.Value, row: ir.Value, pitch: int, column: ir.Value, width: int
) -> ir.Value:
    """Of `width` bytes in a row of `pitch` bytes, as a 64-bit integer."""
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.muli(arith.extsi(i64, row), arith.constant(i64, ir.IntegerAttr.get(i64, pitch)))
    in_row = arith.extui(i64, arith.muli(column, const(width)))
    return arith.addi(global_pointer(ref), arith.addi(offset, in_row))


class Lane:
    """Where this thread stands: warpgroup wg, warp w, c = lane / 4, t = lane % 4."""

    def __init__(self) -> None:
        thread = utils.thread_idx()
        self.thread = thread
        self.lane = arith.andi(thread, const(31))
        self.w = arith.andi(arith.shrui(thread, const(5)), const(3))
        self.wg = arith.shrui(self.thread, const(7))
        self.c = arith.shrui(self.lane, const(2))
        self.t = arith.andi(thread, const(3))


def sum_of(*terms: tuple[ir.Value, int]) -> ir.Value:
    """Σ value · factor, 32 bits."""
    total = None
    for value, factor in terms:
        term = arith.muli(value, const(factor))
        total = term if total is None else arith.addi(total, term)
    assert total is not None
    return total


def ptx(
    lines: list[str], outputs: int, inputs: list[ir.Value], constraint: str = "r"
) -> list[ir.Value]:
    """PTX with 32-bit outputs $0… and inputs after them."""
    struct = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * outputs)})>")
    constraints = ",".join(["=&r"] * outputs + [constraint] * len(inputs) + ["~{memory}"])
    result = llvm.inline_asm(
        struct, inputs, "{ " + "\n".join(lines) + " }", constraints, has_side_effects=True
    )
    return [llvm.extractvalue(i32(), result, [n]) for n in range(outputs)]


_NIBBLE_TO_BF16 = "lop3.b32 {0}, {0}, 0x000F000F, 0x43084308, 0x6A;"  # (x & a) ^ b
_BIAS = 0x43084308  # 136.0 twice


def decode_by_row(values: ir.Value, scale: ir.Value) -> list[ir.Value]:
    """Rows of 64 nibbles (32 bytes, 32-byte swizzle); scales [2, 128 features]."""
    at = Lane()
    row = sum_of((at.wg, 64), (at.w, 16), (at.c, 2))
    # In the upper four of eight rows the swizzle exchanges the two chunks of 16 bytes.
    exchanged = arith.muli(arith.andi(at.c, const(2)), const(8))
    values = arith.addi(values, arith.muli(row, const(32)))
    halves = [arith.addi(values, exchanged), arith.addi(values, arith.xori(exchanged, const(16)))]
    scale = arith.addi(scale, arith.muli(row, const(2)))
    # Byte t of a word and byte t of the word shifted by a nibble, each in its own half.
    selector = arith.addi(arith.muli(at.t, const(0x1111)), const(0x4400))
    lines = [".reg .b32 v<16>, h, s<2>, d<4>, bias;", f"mov.b32 bias, {_BIAS:#x};"]
    halves_in, scale_in, select_in = ("$16", "$17"), "$18", "$19"
    for half in range(2):
        for i in range(2):
            first = 8 * i + 4 * half
            names = ", ".join(f"v{first + n}" for n in range(4))
            lines.append(f"ld.shared.v4.b32 {{{names}}}, [{halves_in[half]} + {32 * i}];")
    for group in range(2):
        lines.append(f"ld.shared.b32 s{group}, [{scale_in} + {2 * FEATURES * group}];")
        for i, pattern in enumerate(("0x1010", "0x3232")):
            lines.append(f"prmt.b32 d{2 * group + i}, s{group}, s{group}, {pattern};")
    for tile in range(8):
        for i in range(2):
            word, out = f"v{8 * i + tile}", f"${2 * tile + i}"
            lines += [
                f"shr.u32 h, {word}, 4;",
                f"prmt.b32 {out}, {word}, h, {select_in};",
                _NIBBLE_TO_BF16.format(out),
                f"sub.rn.bf16x2 {out}, {out}, bias;",
                f"mul.rn.bf16x2 {out}, {out}, d{2 * (tile // 4) + i};",
            ]
    return ptx(lines, 16, [*halves, scale, selector])


def decode_by_column(values: ir.Value, scale: ir.Value) -> list[ir.Value]:
    """Rows of 128 nibbles (64 bytes, 64-byte swizzle); scales [4, 64]."""
    at = Lane()
    # Lane l addresses row l of 32, chunk w of 4; a row pair's chunks are rotated by the swizzle.
    rotation = arith.andi(arith.shrui(at.lane, const(1)), const(3))
    chunk = arith.xori(at.w, rotation)
    values = arith.addi(values, sum_of((at.lane, 64), (chunk, 16)))
    scale = arith.addi(scale, sum_of((at.w, 2 * CONTRACTION), (at.t, 4)))
    shift = arith.muli(at.wg, const(8))
    lines = [".reg .b32 v<8>, s<8>, bias;", f"mov.b32 bias, {_BIAS:#x};"]
    values_in, scale_in, shift_in = "$16", "$17", "$18"
    for half in range(2):
        names = ", ".join(f"v{4 * half + n}" for n in range(4))
        lines.append(
            f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{names}}}, "
            f"[{values_in} + {32 * 64 * half}];"
        )
    for tile in range(8):
        lines.append(f"ld.shared.b32 s{tile}, [{scale_in} + {16 * tile}];")
    for tile in range(8):
        low, high = f"${2 * tile}", f"${2 * tile + 1}"
        lines += [f"shr.u32 {low}, v{tile}, {shift_in};", f"shr.u32 {high}, {low}, 4;"]
        for out in (low, high):
            lines += [
                _NIBBLE_TO_BF16.format(out),
                f"sub.rn.bf16x2 {out}, {out}, bias;",
                f"mul.rn.bf16x2 {out}, {out}, s{tile};",
            ]
    return ptx(lines, 16, [values, scale, shift])


def a_operand(words: list[ir.Value]) -> Any:
    """16 words in the order [column tile, i] as a bf16 [64, 64] array of the WGMMA layout."""
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    single = ir.VectorType.get((1,), i32())
    layout = A_LAYOUT.to_mgpu()
    shape = layout.registers_shape((WARPGROUP_FEATURES, CONTRACTION))
    registers = np.empty(len(words), dtype=object)
    for n, word in enumerate(words):
        registers[n] = vector.bitcast(pair, vector.broadcast(single, word))
    return mgpu.FragmentedArray(
        _registers=registers.reshape(shape), _layout=layout, _is_signed=None
    )


def load_factor(factor: ir.Value, group: ir.Value, block: ir.Value) -> Any:
    """See `fragments.load_factor`."""
    _, blocks, threads, values = ir.MemRefType(factor.type).shape
    index = sum_of((group, blocks * threads), (block, threads), (Lane().thread, 1))
    address = global_address(factor, index, 2 * values, const(0), 1)
    words = []
    for n in range(0, values // 2, 4):
        words += ptx(
            [f"ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [$4 + {4 * n}];"], 4, [address], "l"
        )
    missing = 16 - len(words)
    if missing:
        # Not a constant: ptxas would have to copy it into each operand amid the multiplications.
        words += ptx([f"mov.b32 ${n}, 0;" for n in range(missing)], missing, [])
    return a_operand(words)


def store_low(acc: Any, low: ir.Value, first: ir.Value, rows: ir.Value, scale: float) -> None:
    """See `fragments.store_low`."""
    at = Lane()
    row = sum_of((at.w, 16), (at.c, 1))
    address = global_address(low, arith.addi(first, row), 2 * CONTRACTION, at.t, 4)
    left = arith.subi(rows, row)
    pairs = acc.registers.reshape(-1, 2)
    f32 = ir.F32Type.get()
    zero, factor = (arith.constant(f32, ir.FloatAttr.get(f32, v)) for v in (0.0, scale))
    for tile in range(CONTRACTION // 8):
        for i in range(2):
            values = [zero, zero]
            if tile < len(pairs):
                values = [llvm.extractelement(pairs[tile, i], const(e)) for e in range(2)]
                values = [arith.mulf(value, factor) for value in values]
            lines = [
                ".reg .b32 v; .reg .pred p;",
                f"setp.gt.s32 p, $3, {8 * i};",
                "cvt.rn.bf16x2.f32 v, $1, $0;",
                f"@p st.global.b32 [$2 + {8 * i * 2 * CONTRACTION + 16 * tile}], v;",
            ]
            ptx_void(lines, [*values, address, left], "f,f,l,r")


def store_sums(acc: Any, sums: ir.Value, first: ir.Value) -> None:
    """See `fragments.store_sums`."""
    at = Lane()
    pitch = 4 * acc.shape[1]
    row = arith.addi(first, sum_of((at.w, 16), (at.c, 1)))
    address = global_address(sums, row, pitch, at.t, 8)
    for tile, pair in enumerate(acc.registers.reshape(-1, 2)):
        for i in range(2):
            values = [llvm.extractelement(pair[i], const(e)) for e in range(2)]
            line = f"st.global.v2.f32 [$2 + {8 * i * pitch + 32 * tile}], {{$0, $1}};"
            ptx_void([line], [*values, address], "f,f,l")


class Target(NamedTuple):
    """Where a product goes: `rows` rows of y from `first`, 128 features from `feature`."""

    y: ir.Value
    first: ir.Value
    rows: ir.Value
    feature: ir.Value


def store_rows(by_row: bool, acc: Any, stage: ir.Value, target: Target) -> None:
    """See `fragments.store_rows`; by_row says which order."""
    at = Lane()
    columns = acc.shape[1]
    terms = (32, 8, 1) if by_row else (1, 16, 2)  # of a row's 64 words, two features each
    word = sum_of(*zip((at.wg, at.w, at.c), terms, strict=True))
    mine = arith.addi(stage, sum_of((word, 4), (at.t, 2 * STAGE_PITCH)))
    pairs = acc.registers.reshape(columns // 8, 2)
    copier = _Copier(at, stage, target)
    for start in range(0, columns, STAGE_ROWS):
        staged = min(STAGE_ROWS, columns - start)
        if start:
            _meet()
        for tile in range(staged // 8):
            pair = pairs[start // 8 + tile]
            values = [llvm.extractelement(pair[i], const(e)) for e in range(2) for i in range(2)]
            lines = [".reg .b32 p;"]
            for e in range(2):
                lines += [
                    f"cvt.rn.bf16x2.f32 p, ${2 * e + 1}, ${2 * e};",
                    f"st.shared.b32 [$4 + {(8 * tile + e) * STAGE_PITCH}], p;",
                ]
            ptx_void(lines, [*values, mine], "f,f,f,f,r")
        _meet()
        copier.copy(start, staged)


def _meet() -> None:
    """Both computing warpgroups wait for each other."""
    ptx_void([f"bar.sync {STAGE_BARRIER}, 256;"], [], "")


class _Copier:
    """Staged rows to y: 16 threads a row, 16 bytes each; 16 rows a pass."""

    def __init__(self, at: Lane, stage: ir.Value, target: Target) -> None:
        y, first, rows, feature = target
        self.pitch = 2 * ir.MemRefType(y.type).shape[1]
        part = arith.andi(at.thread, const(15))
        row = arith.shrui(at.thread, const(4))
        self.source = arith.addi(stage, sum_of((row, STAGE_PITCH), (part, 16)))
        column = sum_of((feature, 2), (part, 16))
        self.target = global_address(y, arith.addi(first, row), self.pitch, column, 1)
        self.left = arith.subi(rows, row)

    def copy(self, start: int, staged: int) -> None:
        """Rows `start` and up of the tile, of which `staged` stand in shared memory."""
        for row in range(0, staged, 16):
            lines = [
                ".reg .b32 a<4>; .reg .pred p;",
                f"setp.gt.s32 p, $2, {start + row};",
                f"ld.shared.v4.b32 {{a0, a1, a2, a3}}, [$0 + {row * STAGE_PITCH}];",
                f"@p st.global.v4.b32 [$1 + {(start + row) * self.pitch}], {{a0, a1, a2, a3}};",
            ]
            ptx_void(lines, [self.source, self.target, self.left], "r,l,r")


def ptx_void(lines: list[str], inputs: list[ir.Value], constraints: str) -> None:
    """PTX without outputs; inputs are $0 and up."""
    text = "{ " + "\n".join(lines) + " }"
    constraints = ",".join(filter(None, [constraints, "~{memory}"]))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), inputs, text, constraints, has_side_effects=True)
