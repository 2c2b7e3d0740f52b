"""The other route: one layer's groups decoded to a bf16 scratch array, then multiplied in bf16.

It needs memory for the decoded weights, and time to write and read them whatever the number of
rows. The multiplication is JAX's own grouped kernel for Hopper. An adapter's term is 64 more of the
contraction: the rows' projection beside the rows, the other factor beside the decoded weights.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
from jaxtyping import Array, Float, Int

from kimi_jax.int4 import dequantise
from kimi_jax.kernels.grouped_matmul.derivative import Operands, factors_of, products
from kimi_jax.kernels.grouped_matmul.fragments import Order
from kimi_jax.kernels.grouped_matmul.mosaic import check
from kimi_jax.kernels.grouped_matmul.mosaic_kernel import LowRank, Term
from kimi_jax.kernels.types import GroupedAdapter, GroupedWeight, PackedWeight

_SHAPES: dict[str, Any] = {
    "block_m": 128,
    "block_n": 128,
    "block_k": 64,
    "max_concurrent_steps": 5,
    "grid_block_n": 8,
}


def grouped_matmul(
    x_AI: Float[Array, "A in"],
    weight: GroupedWeight,
    group_sizes_E: Int[Array, " E"],
    adapter: GroupedAdapter | None = None,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "A out"]:
    """y[a] = x[a] · W[g(a)]ᵀ, plus the adapter of g(a); see `kimi_jax.kernels.api.grouped_matmul`.

    Differentiable in the rows and the adapter's factors. The decoded weights are made again for the
    backward pass.

    Raises:
        UserError: what the packed kernel refuses.
    """
    packed = check(x_AI, weight, adapter)
    factors, scale = factors_of(adapter)
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    operands = Operands(x_AI, (packed,), group_sizes_E, index, (factors,))
    ys: Any = products(_Route((scale,)), operands)
    return ys[0]


@dataclass(frozen=True)
class _Route:
    scales: tuple[float, ...]
    interpret: bool = False

    def multiply(
        self,
        terms: tuple[Term, ...],
        group_sizes_E: Array,
        order: Order,
        low_rank: LowRank | None,
        layer: Array | None,
    ) -> Array:
        """The product in one order of the weight."""
        ((x_AC, weight),) = terms
        if layer is not None:
            slices = (jax.lax.dynamic_index_in_dim(v, layer, keepdims=False) for v in weight)
            weight = PackedWeight(*slices)
        decoded = dequantise(*weight)
        by_row = order is Order.BY_ROW
        if low_rank is not None:
            contracted = 2 if by_row else 1
            x_AC, decoded = _extended(x_AC, decoded, low_rank, contracted)
        return ragged_dot(x_AC, decoded, group_sizes=group_sizes_E, transpose_rhs=by_row, **_SHAPES)


def _extended(
    x_AC: Array, decoded: Array, low_rank: LowRank, contracted: int
) -> tuple[Array, Array]:
    """Rows and weights with the low-rank term's beside them, along the weights' contracted axis."""
    groups, width = decoded.shape[0], low_rank.rows.shape[1]
    factor_GFR = low_rank.factor
    padded = jnp.pad(factor_GFR, ((0, 0), (0, 0), (0, width - factor_GFR.shape[2])))
    beside = jnp.broadcast_to(padded, (groups, *padded.shape[1:]))
    if contracted == 1:
        beside = jnp.swapaxes(beside, 1, 2)
    return (
        jnp.concatenate([x_AC, low_rank.rows], axis=1),
        jnp.concatenate([decoded, beside], axis=contracted),
    )
