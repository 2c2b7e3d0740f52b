"""Grouped matmul by packed int4 weights on Hopper GPUs, differentiable; no dequantised weight exists.

Many rows a group are multiplied by `mosaic_kernel`, few by `thin`; both in either order of the
weight. An adapter's term is one more step of the former's contraction. Two products of the same
rows share what reads the rows, and their rows' gradient is one product.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError, listing
from kimi_jax.kernels.grouped_matmul import derivative
from kimi_jax.kernels.grouped_matmul.derivative import Operands, factors_of, products
from kimi_jax.kernels.grouped_matmul.fragments import Order
from kimi_jax.kernels.grouped_matmul.lanes import CONTRACTION, FEATURES
from kimi_jax.kernels.grouped_matmul.mosaic_body import Tuning
from kimi_jax.kernels.grouped_matmul.mosaic_kernel import LowRank, Term, multiply
from kimi_jax.kernels.grouped_matmul.thin import MOST_ROWS, multiply_few
from kimi_jax.kernels.types import GroupedAdapter, GroupedWeight, PackedWeight

MANY_ROWS = Tuning()
# A tile for the rest of each group: the fewer full ones, the more a close fit is worth the compile time.
SOME_ROWS = Tuning(widths=(64, 80, 96, 112, 128, 160, 192, 224, 256))
SOME_ROWS_PER_GROUP = 512  # at most, on average
# Bound by the packed bytes: narrow tiles, and as many copies in flight as shared memory holds.
FEW_ROWS = Tuning(widths=(16, 32, 48, 64), stages=16)
FEW_ROWS_PER_GROUP = 48  # at most, on average
THIN_ROWS_PER_GROUP = MOST_ROWS  # at most, on average, and without an adapter: by `thin`
LARGEST_RANK = CONTRACTION


def grouped_matmul(
    x_AI: Float[Array, "A in"],
    weight: GroupedWeight,
    group_sizes_E: Int[Array, " E"],
    adapter: GroupedAdapter | None = None,
    layer: Int[Array, ""] | int | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
    low: Float[Array, "A r"] | None = None,
) -> Float[Array, "A out"]:
    """y[a] = x[a] · W[g(a)]ᵀ, plus the adapter of g(a); see `kimi_jax.kernels.api.grouped_matmul`.

    Differentiable in the rows and the adapter's factors.

    Args:
        x_AI: rows sorted by group; finite, and so are those that a tile may reach behind the groups.
        weight: packed, of one layer, or of all with a leading layers axis, which is read in place.
        group_sizes_E: int32, known on the device only, summing to A.
        adapter: fp32 factors of one layer; a factor without a group dimension is shared.
        layer: of a stacked weight.
        tuning: by default by the average number of rows in a group.
        interpret: run on the CPU, slowly, for tests.
        low: what `low_rank` made of the same rows and adapter, if it is known.

    Raises:
        UserError: what this kernel does not do.
    """
    packed = check(x_AI, weight, adapter)
    tuning = tuning or _tuning(x_AI.shape[0] / packed.values.shape[-3], adapter is not None)
    (y,) = _products(x_AI, (packed,), group_sizes_E, (adapter,), layer, tuning, interpret, low)
    return y


def grouped_matmul_pair(
    x_AI: Float[Array, "A in"],
    weights: tuple[GroupedWeight, GroupedWeight],
    group_sizes_E: Int[Array, " E"],
    adapters: tuple[GroupedAdapter | None, GroupedAdapter | None] = (None, None),
    layer: Int[Array, ""] | int | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
    low: Float[Array, "A r"] | None = None,
) -> tuple[Float[Array, "A out1"], Float[Array, "A out2"]]:
    """Two `grouped_matmul` of the same rows; see `kimi_jax.kernels.api.grouped_matmul_pair`.

    Two in fact where either would be multiplied by `thin`, or where the adapters' ranks together
    are more than 64; by default, `tuning` is what each would have. Arguments and errors are those of
    `grouped_matmul`.
    """
    several = tuple(check(x_AI, *each) for each in zip(weights, adapters, strict=True))
    tuning = tuning or _tuning(
        x_AI.shape[0] / group_sizes_E.shape[0], all(adapter is not None for adapter in adapters)
    )
    if tuning is None or _ranks(adapters) > LARGEST_RANK:
        assert low is None, "of two products by themselves"
        first, second = (
            grouped_matmul(x_AI, weight, group_sizes_E, adapter, layer, tuning, interpret)
            for weight, adapter in zip(several, adapters, strict=True)
        )
    else:
        operands = x_AI, several, group_sizes_E, adapters, layer
        first, second = _products(*operands, tuning, interpret, low)
    return first, second


def low_rank(
    x_AI: Float[Array, "A in"],
    group_sizes_E: Int[Array, " E"],
    adapters: tuple[GroupedAdapter | None, ...],
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "A r"] | None:
    """See `kimi_jax.kernels.api.grouped_low_rank`."""
    tuning = tuning or _tuning(
        x_AI.shape[0] / group_sizes_E.shape[0], all(adapter is not None for adapter in adapters)
    )
    if tuning is None or _ranks(adapters) > LARGEST_RANK:
        return None  # two products, each with its own
    factors, scales = zip(*map(factors_of, adapters), strict=True)
    return derivative.low_rank(x_AI, group_sizes_E, factors, scales, interpret)


def _ranks(adapters: tuple[GroupedAdapter | None, ...]) -> int:
    return sum(adapter.a.shape[-2] for adapter in adapters if adapter is not None)


def _products(
    x_AI: Array,
    weights: tuple[PackedWeight, ...],
    group_sizes_E: Array,
    adapters: tuple[GroupedAdapter | None, ...],
    layer: Array | int | None,
    tuning: Tuning | None,
    interpret: bool,
    low: Array | None,
) -> tuple[Array, ...]:
    factors, scales = zip(*map(factors_of, adapters), strict=True)
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    route = _Route(scales, tuning, interpret)
    return products(route, Operands(x_AI, weights, group_sizes_E, index, factors, low))


def _tuning(rows_per_group: float, adapted: bool) -> Tuning | None:
    """None: by `thin`."""
    if rows_per_group <= THIN_ROWS_PER_GROUP and not adapted:
        return None
    if rows_per_group <= FEW_ROWS_PER_GROUP:
        return FEW_ROWS
    return SOME_ROWS if rows_per_group <= SOME_ROWS_PER_GROUP else MANY_ROWS


def check(
    x_AI: Float[Array, "A in"], weight: GroupedWeight, adapter: GroupedAdapter | None = None
) -> PackedWeight:
    """The weight; raises UserError with everything that keeps these operands from the packed kernels."""
    if problems := problems_of(x_AI, weight, adapter):
        raise UserError(listing("The packed grouped matmul cannot take these operands:", problems))
    assert isinstance(weight, PackedWeight)
    return weight


def problems_of(
    x_AI: Float[Array, "A in"], weight: GroupedWeight, adapter: GroupedAdapter | None = None
) -> list[str]:
    """What keeps these operands from the packed kernels: for each, what was found and is required."""
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
    return problems


@dataclass(frozen=True)
class _Route:
    scales: tuple[float, ...]
    tuning: Tuning | None  # None: by `thin`
    interpret: bool

    def multiply(
        self,
        terms: tuple[Term, ...],
        group_sizes_E: Array,
        order: Order,
        low_rank: LowRank | None,
        layer: Array | None,
    ) -> Array:
        """The product in one order of the weight."""
        index = 0 if layer is None else layer
        if self.tuning is None:
            ((x_AC, weight),) = terms
            return multiply_few(x_AC, weight, group_sizes_E, order, index, self.interpret)
        # Fewer stages where the contraction is short.
        contraction = sum(term.rows.shape[1] for term in terms)
        stages = min(self.tuning.stages, contraction // CONTRACTION - 1)
        tuning = replace(self.tuning, stages=stages)
        return multiply(terms, group_sizes_E, order, low_rank, index, tuning, self.interpret)
