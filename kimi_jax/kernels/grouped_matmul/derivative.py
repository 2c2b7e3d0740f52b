"""The grouped matmul's derivatives, for whatever multiplies on a Hopper GPU.

The product and its derivative with respect to the rows are a route's `multiply`, in the one and the
other order of the weight. An adapter's rows come from `project`, and its factors' gradients from
`factor_gradient`. The backward pass keeps the packed weight by reference and, for an adapter, the
rows and their projection. The kernels' functions are jitted by themselves: a model calls each many
times, and each is lowered once.
"""

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.grouped_matmul.factor_gradient import factor_gradient
from kimi_jax.kernels.grouped_matmul.fragments import Order
from kimi_jax.kernels.grouped_matmul.mosaic_kernel import LowRank
from kimi_jax.kernels.grouped_matmul.project import project
from kimi_jax.kernels.types import PackedWeight


class Route(Protocol):
    """How to multiply; hashable."""

    @property
    def scale(self) -> float:
        """Of the adapter's term."""
        ...

    @property
    def interpret(self) -> bool:
        """Whether to run on the CPU, for tests."""
        ...

    def multiply(
        self,
        x_AC: Array,
        weight: PackedWeight,
        group_sizes_E: Array,
        order: Order,
        low_rank: LowRank | None,
        layer: Array | None,
    ) -> Array:
        """See `mosaic_kernel.multiply`."""
        ...


class Operands(NamedTuple):
    """Of one product. a, b: an adapter's factors."""

    x: Array
    weight: PackedWeight
    group_sizes: Array
    layer: Array | None
    a: Array | None
    b: Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(route: Route, operands: Operands) -> Array:
    """y[a] = x[a] · W[g(a)]ᵀ plus the adapter's term, differentiable in the rows and the factors."""
    return _forward(route, operands)[0]


def _forward(route: Route, operands: Operands) -> tuple[Array, tuple]:
    x, weight, sizes, layer, a, b = operands
    low = term = None
    if a is not None and b is not None:
        low = project(x, _by_group(a), sizes, route.scale, route.interpret)
        term = LowRank(low, _by_group(b))
    y = route.multiply(x, weight, sizes, Order.BY_ROW, term, layer)
    return y, (low, operands if term else operands._replace(x=None))


def _backward(route: Route, saved: tuple, dy: Array) -> tuple:
    low, (x, weight, sizes, layer, a, b) = saved
    term = da = db = None
    if low is not None:
        transposed_b = jnp.swapaxes(_by_group(b), 1, 2)
        low_dy = project(dy, transposed_b, sizes, route.scale, route.interpret)
        term = LowRank(low_dy, jnp.swapaxes(_by_group(a), 1, 2))
        rank = a.shape[-2]
        da = jnp.swapaxes(factor_gradient(x, low_dy, sizes, rank, route.interpret), 1, 2)
        db = factor_gradient(dy, low, sizes, rank, route.interpret)
        da = da if a.ndim == 3 else da.sum(axis=0)
        db = db if b.ndim == 3 else db.sum(axis=0)
    dx = route.multiply(dy, weight, sizes, Order.BY_COLUMN, term, layer)
    return (Operands(dx, None, None, None, da, db),)  # pyright: ignore[reportArgumentType]


def _by_group(factor: Array) -> Array:
    """bf16, with a leading axis of groups, or of one where the factor is shared."""
    return (factor if factor.ndim == 3 else factor[None]).astype(jnp.bfloat16)


product.defvjp(_forward, _backward)
