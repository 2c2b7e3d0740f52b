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


class LowRank(NamedTuple):
    """A low-rank term added to the product: one more step of the contraction.

    rows: bf16 [A, 64], zero beyond the rank. factor: of each group's features, or one for all groups.
    """

    rows: BFloat16[Array, "A 64"]
    factor: BFloat16[Array, "G features R"]


@partial(jax.jit, static_argnames=("order", "tuning", "interpret"))
def multiply(
    x_AC: BFloat16[Array, "A C"],
    weight: PackedWeight,
    group_sizes_E: Int[Array, " E"],
    order: Order,
    low_rank: LowRank | None = None,
    layer: Int[Array, ""] | int = 0,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "A features"]:
    """y[a] = x[a] · W[g(a)]ᵀ (BY_ROW) or x[a] · W[g(a)] (BY_COLUMN), accumulated in fp32.

    Args:
        x_AC: rows sorted by group.
        weight: values [E, out, in] and scale [E, in/32, out], or both with a leading layers axis.
        group_sizes_E: int32, summing to A.
        order: BY_ROW contracts `in`, BY_COLUMN contracts `out`.
        low_rank: added to the product.
        layer: of a stacked weight; the stack is read in place.
        tuning: shapes of the pipeline.
        interpret: run on the CPU, with the work of `fragments` done in plain JAX.
    """
    tuning = tuning or Tuning()
    groups, out, width_in = weight.values.shape[-3:]
    features, contraction = (out, width_in) if order is Order.BY_ROW else (width_in, out)
    steps = contraction // CONTRACTION
    assert features % FEATURES == 0, f"{features} features"
    assert contraction % (2 * CONTRACTION) == 0, f"contraction of {contraction}"
    # One warpgroup is never more than `stages` steps ahead of the other, so it does not reach the
    # next tile's staging area while the other still copies from it.
    assert steps > tuning.stages, f"{steps} steps, {tuning.stages} stages"
    table, count = tile_table(group_sizes_E, x_AC.shape[0], tuning.widths)
    first_group = jnp.asarray(layer, jnp.int32) * groups
    plan = Plan(order, tuning, features // FEATURES, steps, out, width_in, interpret)
    kernel = launch(
        f"grouped_int4_{order.value}",
        plan.with_low_rank if low_rank else plan.without_low_rank,
        jax.ShapeDtypeStruct((x_AC.shape[0], features), jnp.bfloat16),
        tuning.blocks,
        COMPUTING + 1,
        _scratch(order, tuning, interpret),
        interpret,
    )
    return kernel(
        table,
        jnp.concatenate([count, first_group.reshape(1)]),
        x_AC,
        weight.values.reshape(-1, width_in),
        weight.scale.reshape(-1, out),
        *(_operands(low_rank, order, interpret) if low_rank else ()),
    )


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
