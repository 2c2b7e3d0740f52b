"""Grouped matmul by packed int4 weights on Hopper GPUs, differentiable; no dequantised weight exists.

The product and its derivative with respect to the rows are `mosaic_kernel.multiply`, in the one and
the other order of the weight. An adapter's term is one more step of the same kernels; its rows come
from `project`, and its factors' gradients from `factor_gradient`. The backward pass keeps the packed
weight by reference and, for an adapter, the rows and their projection.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError, listing
from kimi_jax.kernels.grouped_matmul.factor_gradient import factor_gradient
from kimi_jax.kernels.grouped_matmul.fragments import Order, arrange_factor
from kimi_jax.kernels.grouped_matmul.lanes import CONTRACTION, FEATURES
from kimi_jax.kernels.grouped_matmul.mosaic_body import Tuning
from kimi_jax.kernels.grouped_matmul.mosaic_kernel import LowRank, multiply
from kimi_jax.kernels.grouped_matmul.project import project
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight

MANY_ROWS = Tuning()
# Bound by the packed bytes: narrow tiles, and as many copies in flight as shared memory holds.
FEW_ROWS = Tuning(widths=(16, 32, 48, 64), stages=16)
FEW_ROWS_PER_GROUP = 48  # at most, on average
LARGEST_RANK = CONTRACTION


def grouped_matmul(
    x_AI: Float[Array, "A in"],
    weight: PackedWeight,
    group_sizes_E: Int[Array, " E"],
    adapter: GroupedAdapter | None = None,
    layer: Int[Array, ""] | int = 0,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "A out"]:
    """y[a] = x[a] · W[g(a)]ᵀ, plus the adapter of g(a); see `kimi_jax.kernels.api.grouped_matmul`.

    Differentiable in the rows and the adapter's factors.

    Args:
        x_AI: rows sorted by group; finite.
        weight: packed, of one layer, or of all with a leading layers axis, which is read in place.
        group_sizes_E: int32, known on the device only, summing to A.
        adapter: fp32 factors of one layer; a factor without a group dimension is shared.
        layer: of a stacked weight.
        tuning: by default by the average number of rows in a group.
        interpret: run on the CPU, slowly, for tests.

    Raises:
        UserError: what this kernel does not do.
    """
    check(x_AI, weight, adapter)
    a, b, scale = adapter or (None, None, 1.0)
    groups = weight.values.shape[-3]
    few = x_AI.shape[0] <= FEW_ROWS_PER_GROUP * groups
    chosen = tuning or (FEW_ROWS if few else MANY_ROWS)
    layer = jnp.asarray(layer, jnp.int32)
    return _product(_Static(scale, chosen, interpret), x_AI, weight, group_sizes_E, layer, a, b)


def check(
    x_AI: Float[Array, "A in"], weight: object, adapter: GroupedAdapter | None = None
) -> None:
    """Raises UserError with everything that keeps these operands from the packed kernels."""
    problems = []
    if not isinstance(weight, PackedWeight):
        problems.append("the weight is not packed int4")
    else:
        out, width = weight.values.shape[-2:]
        for name, size in (("out", out), ("in", width)):
            if size % FEATURES or size < 2 * FEATURES:
                least = 2 * FEATURES
                problems.append(
                    f"{name} is {size}; required: a multiple of {FEATURES} from {least}"
                )
    if x_AI.dtype != jnp.bfloat16:
        problems.append(f"rows are {x_AI.dtype}; required: bfloat16")
    if adapter is not None and adapter.a.shape[-2] > LARGEST_RANK:
        problems.append(f"rank is {adapter.a.shape[-2]}; required: at most {LARGEST_RANK}")
    if problems:
        raise UserError(listing("The packed grouped matmul cannot take these operands:", problems))


class _Static(NamedTuple):
    scale: float
    tuning: Tuning
    interpret: bool

    def fit(self, contraction: int) -> Tuning:
        """Fewer stages where the contraction is short."""
        stages = min(self.tuning.stages, contraction // CONTRACTION - 1)
        return replace(self.tuning, stages=stages)

    def arrange(self, factor_GFR: Array, order: Order) -> Array:
        """A low-rank factor as `multiply` takes it."""
        if self.interpret:
            missing = CONTRACTION - factor_GFR.shape[2]
            return jnp.pad(factor_GFR, ((0, 0), (0, 0), (0, missing)))
        return arrange_factor(factor_GFR, order)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    static: _Static,
    x: Array,
    weight: PackedWeight,
    group_sizes: Array,
    layer: Array,
    a: Array | None,
    b: Array | None,
) -> Array:
    return _forward(static, x, weight, group_sizes, layer, a, b)[0]


def _forward(
    static: _Static,
    x: Array,
    weight: PackedWeight,
    group_sizes: Array,
    layer: Array,
    a: Array | None,
    b: Array | None,
) -> tuple[Array, tuple]:
    low = term = None
    if a is not None and b is not None:
        low = project(x, _by_group(a), group_sizes, static.scale, static.interpret)
        term = LowRank(low, static.arrange(_by_group(b), Order.BY_ROW))
    tuning, interpret = static.fit(x.shape[1]), static.interpret
    y = multiply(x, weight, group_sizes, Order.BY_ROW, term, layer, tuning, interpret)
    return y, (None if low is None else x, low, weight, group_sizes, layer, a, b)


def _backward(static: _Static, saved: tuple, dy: Array) -> tuple:
    x, low, weight, group_sizes, layer, a, b = saved
    term = da = db = None
    if low is not None:
        transposed_b = jnp.swapaxes(_by_group(b), 1, 2)
        low_dy = project(dy, transposed_b, group_sizes, static.scale, static.interpret)
        transposed_a = jnp.swapaxes(_by_group(a), 1, 2)
        term = LowRank(low_dy, static.arrange(transposed_a, Order.BY_COLUMN))
        rank = a.shape[-2]
        da = jnp.swapaxes(factor_gradient(x, low_dy, group_sizes, rank, static.interpret), 1, 2)
        db = factor_gradient(dy, low, group_sizes, rank, static.interpret)
        da = da if a.ndim == 3 else da.sum(axis=0)
        db = db if b.ndim == 3 else db.sum(axis=0)
    tuning, interpret = static.fit(dy.shape[1]), static.interpret
    dx = multiply(dy, weight, group_sizes, Order.BY_COLUMN, term, layer, tuning, interpret)
    return dx, None, None, None, da, db


def _by_group(factor: Array) -> Array:
    """bf16, with a leading axis of groups, or of one where the factor is shared."""
    return (factor if factor.ndim == 3 else factor[None]).astype(jnp.bfloat16)


_product.defvjp(_forward, _backward)
