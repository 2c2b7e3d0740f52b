"""Register-level pieces of the Hopper kernels: packed int4 to WGMMA operands, accumulators to rows.

A warpgroup's WGMMA takes its A operand (64 rows × 64 of the contraction) from registers. Thread
`32 w + 4 c + t` (warp w, c < 8, t < 4) holds, for each of 8 column tiles and i < 2, the pair of
columns 8·tile + 2t, +1 of row 16 w + 8 i + c. Which weight feature stands in which row is free, as
long as the rows of the accumulator are read back accordingly. Two such orders are used:

- `BY_ROW` (features are the weight's rows, `out`): feature 64·wg + 16 w + 2 c + i. A thread reads two
  whole rows and keeps byte t of each of their words: two values next to each other along `in`.
- `BY_COLUMN` (features are the weight's columns, `in`): feature 32 w + 4 c + 2·wg + i of 128. A
  transposing matrix load of 16-bit units gives each thread four neighbouring columns of two rows;
  nibble 2·wg + i of both is the pair. So nibbles are transposed without unpacking them first.

In both, a thread's i = 0 and 1 are neighbouring features, so an output word of two bf16 is local.

int4 to bf16: a nibble with its top bit flipped is value + 8; put in the mantissa of 128.0 it reads as
136 + value, exactly. Subtracting 136 and multiplying by the scale rounds once, as `dequantise` does.
"""

import enum
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxtyping import Array

from kimi_jax.kernels.grouped_matmul import lanes
from kimi_jax.kernels.grouped_matmul.lanes import (
    A_LAYOUT,
    CONTRACTION,
    FEATURES,
    WARPGROUP_FEATURES,
)
from kimi_jax.kernels.grouped_matmul.pipeline import swizzled

_REF = plgpu.RefType(())
_SCALAR = plgpu.Layout.WG_SPLAT(())
_A_OPERAND = plgpu.ShapeDtypeStruct((WARPGROUP_FEATURES, CONTRACTION), jnp.bfloat16, A_LAYOUT)
# By its annotations, what it decorates keeps the context argument that callers leave out.
_inline: Any = plgpu.inline_mgpu


class Order(enum.Enum):
    """Which dimension of the weight are the features of the product; the other is contracted."""

    BY_ROW = "forward"
    BY_COLUMN = "input_gradient"

    @property
    def values_transforms(self) -> tuple[Any, ...]:
        """Of a step's packed weights in shared memory.

        Tiled though one tile is the whole width: a copy of untiled 4-bit rows counts its offset
        along the row in bytes instead of values (jax 0.11.2).
        """
        values = CONTRACTION if self is Order.BY_ROW else FEATURES
        return swizzled(8, values, values // 2)


def decode(order: Order, values_ref: Any, scale_ref: Any) -> Any:
    """A pipeline step's packed weights as this warpgroup's A operand, bf16 [64, 64] in registers.

    Args:
        order: of the features.
        values_ref: shared memory, int4: BY_ROW [128 features, 64], BY_COLUMN [64, 128 features].
        scale_ref: shared memory, bf16: BY_ROW [2, 128 features], BY_COLUMN [4, 64].
    """

    values_type = plgpu.RefType(order.values_transforms)

    @_inline(arg_types=(values_type, _REF), return_type=_A_OPERAND)
    def inlined(ctx: Any, values: ir.Value, scale: ir.Value) -> Any:
        del ctx
        emit = lanes.decode_by_row if order is Order.BY_ROW else lanes.decode_by_column
        words = emit(lanes.shared_address(values), lanes.shared_address(scale))
        return lanes.a_operand(words)

    return inlined(values_ref, scale_ref)


def arrange_factor(factor_GFR: Array, order: Order) -> Array:
    """Low-rank factors in the order in which threads hold an A operand, for `load_factor`.

    Args:
        factor_GFR: bf16 [G, features, rank], features a multiple of 128, rank at most 64.
        order: of the features.

    Returns:
        bf16 [G, features/128, 256 threads, values of a thread]; the rank is padded to 16.
    """
    groups, features, rank = factor_GFR.shape
    padded = jnp.pad(factor_GFR, ((0, 0), (0, 0), (0, -rank % 16)))
    columns = (-(-rank // 16) * 2, 4, 2)  # tile, t, one of a pair
    blocks = features // FEATURES
    if order is Order.BY_ROW:
        split = padded.reshape(groups, blocks, 2, 4, 8, 2, *columns)  # wg, w, c, i
        arranged = split.transpose(0, 1, 2, 3, 4, 7, 6, 5, 8)
    else:
        split = padded.reshape(groups, blocks, 4, 8, 2, 2, *columns)  # w, c, wg, i
        arranged = split.transpose(0, 1, 4, 2, 3, 7, 6, 5, 8)
    return arranged.reshape(groups, blocks, 256, -1)


def load_factor(factor_ref: Any, group: Any, block: Any) -> Any:
    """A block's factor as this warpgroup's A operand, bf16 [64, 64], zero beyond the rank.

    Args:
        factor_ref: global memory, from `arrange_factor`.
        group: which factor; block: which 128 features.
    """

    @_inline(arg_types=(_REF, _SCALAR, _SCALAR), return_type=_A_OPERAND)
    def inlined(ctx: Any, factor: ir.Value, group: Any, block: Any) -> Any:
        del ctx
        return lanes.load_factor(factor, *_values(group, block))

    return inlined(factor_ref, group, block)


def store_rows(
    order: Order, accumulator: Any, stage_ref: Any, y_ref: Any, first: Any, rows: Any, feature: Any
) -> None:
    """Writes an accumulator [64, N] of each of two warpgroups to rows of y, through shared memory.

    Args:
        order: of the features.
        accumulator: fp32, WGMMA layout; its columns are the rows of y.
        stage_ref: shared memory, bytes, at least N · STAGE_PITCH.
        y_ref: global memory, bf16 [A, features].
        first: first row; rows: how many of the N to write; feature: first of the block's 128.
    """

    @_inline(arg_types=(plgpu.Layout.WGMMA, _REF, _REF, _SCALAR, _SCALAR, _SCALAR), return_type=())
    def inlined(
        ctx: Any, acc: Any, stage: ir.Value, y: ir.Value, first: Any, rows: Any, feature: Any
    ) -> None:
        del ctx
        target = lanes.Target(y, *_values(first, rows, feature))
        lanes.store_rows(order is Order.BY_ROW, acc, lanes.shared_address(stage), target)

    inlined(accumulator, stage_ref, y_ref, first, rows, feature)


def store_low(accumulator: Any, low_ref: Any, first: Any, rows: Any, scale: float) -> None:
    """Writes scale · accumulator [64, R] to rows of a bf16 [A, 64], with zeros beyond R.

    Args:
        accumulator: fp32, WGMMA layout.
        low_ref: global memory.
        first: first row; rows: how many of the 64 to write.
        scale: multiplies the sums.
    """

    @_inline(arg_types=(plgpu.Layout.WGMMA, _REF, _SCALAR, _SCALAR), return_type=())
    def inlined(ctx: Any, acc: Any, low: ir.Value, first: Any, rows: Any) -> None:
        del ctx
        first, rows = _values(first, rows)
        lanes.store_low(acc, low, first, rows, scale)

    inlined(accumulator, low_ref, first, rows)


def store_sums(accumulator: Any, sums_ref: Any, first: Any) -> None:
    """Writes an accumulator [64, R] to the rows from `first` of an fp32 [rows, R].

    Args:
        accumulator: fp32, WGMMA layout.
        sums_ref: global memory.
        first: first row.
    """

    @_inline(arg_types=(plgpu.Layout.WGMMA, _REF, _SCALAR), return_type=())
    def inlined(ctx: Any, acc: Any, sums: ir.Value, first: Any) -> None:
        del ctx
        lanes.store_sums(acc, sums, *_values(first))

    inlined(accumulator, sums_ref, first)


def _values(*scalars: Any) -> Any:
    return [scalar.registers.item() for scalar in scalars]
