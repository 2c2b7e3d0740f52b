"""Rows sorted by group times packed int4 weights on Hopper, in Pallas Mosaic GPU.

One kernel serves the product and its derivative with respect to the rows; `fragments.Order` says
which. `mosaic_body` has its code, this module its operands and shapes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int

from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.kernels.grouped_matmul.fragments import Order, arrange_factor
from kimi_jax.kernels.grouped_matmul.lanes import (
    CONTRACTION,
    FEATURES,
    STAGE_PITCH,
    STAGE_ROWS,
    WARPGROUP_FEATURES,
)
from kimi_jax.kernels.grouped_matmul.mosaic_body import COMPUTING, Plan, Tuning
from kimi_jax.kernels.grouped_matmul.pipeline import OPERAND, Ring, launch, rows_memory
from kimi_jax.kernels.grouped_matmul.schedule import tile_table
from kimi_jax.kernels.types import PackedWeight


class Term(NamedTuple):
    """Of a sum of products that have the same groups and features: rows [A, C] and their weight.

    The weight: values [E, out, in] and scale [E, in/32, out], or both with a leading layers axis.
    """

    rows: BFloat16[Array, "A C"]
    weight: PackedWeight


class LowRank(NamedTuple):
    """A low-rank term added to the product: one more step of the contraction.

    rows: bf16 [A, 64], zero beyond the rank. factor: of each group's features, or one for all groups.
    """

    rows: BFloat16[Array, "A 64"]
    factor: BFloat16[Array, "G features R"]


@partial(jax.jit, static_argnames=("order", "tuning", "interpret"))
def multiply(
    terms: tuple[Term, ...],
    group_sizes_E: Int[Array, " E"],
    order: Order,
    low_rank: LowRank | None = None,
    layer: Int[Array, ""] | int = 0,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "A features"]:
    """y[a] = Σ x[a] · W[g(a)]ᵀ (BY_ROW) or Σ x[a] · W[g(a)] (BY_COLUMN), accumulated in fp32.

    The sum is over terms: the contraction runs on from one to the next, and is stored once.

    Args:
        terms: rows sorted by group, and weights; all of the same features.
        group_sizes_E: int32, summing to A.
        order: BY_ROW contracts `in`, BY_COLUMN contracts `out`.
        low_rank: added to the product.
        layer: of a stacked weight; the stack is read in place.
        tuning: shapes of the pipeline.
        interpret: run on the CPU, with the work of `fragments` done in plain JAX.
    """
    tuning = tuning or Tuning()
    rows, groups = terms[0].rows.shape[0], group_sizes_E.shape[0]
    features, steps = _shape(terms, order)
    # One warpgroup is never more than `stages` steps ahead of the other, so it does not reach the
    # next tile's staging area while the other still copies from it.
    assert sum(steps) > tuning.stages, f"{steps} steps, {tuning.stages} stages"
    table, count = tile_table(group_sizes_E, rows, tuning.widths)
    first_group = jnp.asarray(layer, jnp.int32) * groups
    plan = Plan(order, tuning, features // FEATURES, steps, low_rank is not None, interpret)
    kernel = launch(
        f"grouped_int4_{order.value}" + "_pair" * (len(terms) - 1),
        plan.run,
        jax.ShapeDtypeStruct((rows, features), jnp.bfloat16),
        tuning.blocks * tuning.turns,
        COMPUTING + 1,
        _scratch(order, tuning, interpret),
        interpret,
        operations=2 * rows * features * sum(steps) * CONTRACTION,
    )
    return kernel(
        table,
        jnp.concatenate([count, first_group.reshape(1)]),
        *(operand for term in terms for operand in _in_rows(term)),
        *(_operands(low_rank, order, interpret) if low_rank else ()),
    )


def _shape(terms: tuple[Term, ...], order: Order) -> tuple[int, tuple[int, ...]]:
    """The features, and the steps of each term."""
    by_row = order is Order.BY_ROW
    shapes = [term.weight.values.shape[-2:] for term in terms]
    (features,) = {out if by_row else width_in for out, width_in in shapes}
    assert features % FEATURES == 0, f"{features} features"
    steps = []
    for term, (out, width_in) in zip(terms, shapes, strict=True):
        contraction = width_in if by_row else out
        assert term.rows.shape[1] == contraction, f"rows {term.rows.shape}, weight {out, width_in}"
        assert contraction % (2 * CONTRACTION) == 0, f"contraction of {contraction}"
        steps.append(contraction // CONTRACTION)
    return features, tuple(steps)


def _in_rows(term: Term) -> tuple[Array, Array, Array]:
    """Rows, values [layers · E · out, in] and scales [layers · E · in/32, out]."""
    values, scale = (each.reshape(-1, each.shape[-1]) for each in term.weight)
    return term.rows, values, scale


def _operands(low_rank: LowRank, order: Order, interpret: bool) -> tuple[Array, Array]:
    rows, factor = low_rank
    if interpret:
        missing = CONTRACTION - factor.shape[2]
        return rows, jnp.pad(factor, ((0, 0), (0, 0), (0, missing)))
    return rows, arrange_factor(factor, order)


def _scratch(order: Order, tuning: Tuning, interpret: bool) -> dict[str, Any]:
    stages, widest = tuning.stages, tuning.widths[-1]
    in_values, in_scales = (FEATURES, CONTRACTION), (CONTRACTION // GROUP_SIZE, FEATURES)
    if order is Order.BY_COLUMN:
        in_values, in_scales = (CONTRACTION, FEATURES), (FEATURES // GROUP_SIZE, CONTRACTION)
    stage = plgpu.SMEM((min(widest, STAGE_ROWS) * STAGE_PITCH,), jnp.int8)
    if interpret:
        shape = (COMPUTING, WARPGROUP_FEATURES, CONTRACTION)
        stage = plgpu.SMEM(shape, jnp.bfloat16, transforms=OPERAND)
    return {
        "x_smem": rows_memory((stages, widest, CONTRACTION), interpret),
        "values_smem": plgpu.SMEM(
            (stages, *in_values), jnp.int4, transforms=order.values_transforms
        ),
        "scale_smem": plgpu.SMEM((stages, *in_scales), jnp.bfloat16),
        "stage_smem": stage,
        **Ring.barriers(stages, copies=3, computing=COMPUTING),
    }
