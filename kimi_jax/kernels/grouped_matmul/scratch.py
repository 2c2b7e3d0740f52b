"""The other route: one layer's groups decoded to a bf16 scratch array, then multiplied in bf16.

It needs memory for the decoded weights, and time to write and read them whatever the number of
rows. The multiplication is JAX's own grouped kernel for Hopper.
"""

from typing import Any

import jax
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.int4 import dequantise
from kimi_jax.kernels.grouped_matmul.mosaic import check
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight

_SHAPES: dict[str, Any] = {
    "block_m": 128,
    "block_n": 128,
    "block_k": 64,
    "max_concurrent_steps": 5,
    "grid_block_n": 8,
}


def grouped_matmul(
    x_AI: Float[Array, "A in"],
    weight: PackedWeight,
    group_sizes_E: Int[Array, " E"],
    adapter: GroupedAdapter | None = None,
) -> Float[Array, "A out"]:
    """y[a] = x[a] · W[g(a)]ᵀ; see `kimi_jax.kernels.api.grouped_matmul`.

    Differentiable in the rows. The decoded weights are made again for the backward pass.

    Raises:
        UserError: what the packed kernel refuses, and adapters.
    """
    check(x_AI, weight, adapter)
    if adapter is not None:
        raise UserError("The scratch route takes no adapter; required: impl pallas or reference")
    return _product(x_AI, weight, group_sizes_E)


@jax.custom_vjp
def _product(x: Array, weight: PackedWeight, group_sizes: Array) -> Array:
    decoded = dequantise(weight.values, weight.scale)
    return ragged_dot(x, decoded, group_sizes=group_sizes, transpose_rhs=True, **_SHAPES)


def _forward(x: Array, weight: PackedWeight, group_sizes: Array) -> tuple[Array, tuple]:
    return _product(x, weight, group_sizes), (weight, group_sizes)


def _backward(saved: tuple, dy: Array) -> tuple:
    weight, group_sizes = saved
    decoded = dequantise(weight.values, weight.scale)
    return ragged_dot(dy, decoded, group_sizes=group_sizes, **_SHAPES), None, None


_product.defvjp(_forward, _backward)
