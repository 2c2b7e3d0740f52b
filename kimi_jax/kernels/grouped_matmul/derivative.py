"""The grouped matmul's derivatives, for whatever multiplies on a Hopper GPU.

One product, or several of the same rows, as an expert's gate and up: their derivative with respect to
the rows is one product whose contraction runs over all their weights, and their adapters are one
adapter whose ranks are all of theirs, so that the rows are read once for each purpose.

The product and its derivative with respect to the rows are a route's `multiply`, in the one and the
other order of the weight. An adapter's rows come from `project`, and its factors' gradients from
`factor_gradient`. The backward pass keeps the packed weight by reference and, for an adapter, the
rows and their projection. The kernels' functions are jitted by themselves: a model calls each many
times, and each is lowered once.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.grouped_matmul.factor_gradient import factor_gradient
from kimi_jax.kernels.grouped_matmul.fragments import Order
from kimi_jax.kernels.grouped_matmul.lanes import CONTRACTION
from kimi_jax.kernels.grouped_matmul.mosaic_kernel import LowRank, Term
from kimi_jax.kernels.grouped_matmul.project import Narrow, project
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight


class Route(Protocol):
    """How to multiply; hashable."""

    @property
    def scales(self) -> tuple[float, ...]:
        """Of each product's adapter."""
        ...

    @property
    def interpret(self) -> bool:
        """Whether to run on the CPU, for tests."""
        ...

    def multiply(
        self,
        terms: tuple[Term, ...],
        group_sizes_E: Array,
        order: Order,
        low_rank: LowRank | None,
        layer: Array | None,
    ) -> Array:
        """See `mosaic_kernel.multiply`."""
        ...


class Factors(NamedTuple):
    """Of one adapter, with or without a leading axis of groups."""

    a: Array
    b: Array


class Operands(NamedTuple):
    """Of products of the same rows: the weight of each, and its adapter's factors or None.

    low: what `low_rank` made of rows and factors, if it is known.
    """

    x: Array
    weights: tuple[PackedWeight, ...]
    group_sizes: Array
    layer: Array | None
    factors: tuple[Factors | None, ...]
    low: Array | None = None


def factors_of(adapter: GroupedAdapter | None) -> tuple[Factors | None, float]:
    """An adapter's factors and scale."""
    return (None, 1.0) if adapter is None else (Factors(adapter.a, adapter.b), adapter.scale)


def low_rank(
    x_AC: Array,
    group_sizes_E: Array,
    factors: tuple[Factors | None, ...],
    scales: tuple[float, ...],
    interpret: bool = False,
) -> Array | None:
    """Rows times all adapters' a, bf16 [A, ranks of all], or None if there is no adapter.

    Not differentiable: what it is an operand of is differentiated as if it were made there.
    """
    x_AC, factors = jax.lax.stop_gradient((x_AC, factors))
    adapters = _Adapters(scales, factors)
    if not adapters.rank:
        return None
    term = Narrow(x_AC, adapters.a(True))
    return project((term,), group_sizes_E, adapters.scale, interpret)[:, : adapters.rank]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(route: Route, operands: Operands) -> tuple[Array, ...]:
    """y[a] = x[a] · W[g(a)]ᵀ plus the adapter's term for each weight W.

    Differentiable in the rows and the factors.
    """
    return _forward(route, operands)[0]


def _forward(route: Route, operands: Operands) -> tuple[tuple[Array, ...], Operands]:
    x, weights, sizes, layer, factors, low = operands
    adapters = _Adapters(route.scales, factors)
    terms: list[LowRank | None] = [None] * len(weights)
    if adapters.rank:
        if low is None:
            low = low_rank(x, sizes, factors, route.scales, route.interpret)
        assert low is not None
        rows = jnp.pad(low, ((0, 0), (0, CONTRACTION - adapters.rank)))
        for n, pair, first in adapters:
            # Zeros for the other adapters' ranks; up to a rank of 64 it is one step in any case.
            terms[n] = LowRank(rows, adapters.placed(_by_group(pair.b), first))
    ys = tuple(
        route.multiply((Term(x, weight),), sizes, Order.BY_ROW, term, layer)
        for weight, term in zip(weights, terms, strict=True)
    )
    return ys, operands._replace(low=low, x=x if adapters.rank else None)


def _backward(route: Route, saved: Operands, dys: tuple[Array, ...]) -> tuple[Operands]:
    x, weights, sizes, layer, factors, low = saved
    adapters = _Adapters(route.scales, factors)
    gradients: list[Factors | None] = [None] * len(weights)
    term = None
    if adapters.rank:
        narrow = []
        for n, pair, first in adapters:
            factor = adapters.placed(adapters.scaled(pair.b, n), first)
            narrow.append(Narrow(dys[n], jnp.swapaxes(factor, 1, 2)))
        low_dy = project(tuple(narrow), sizes, adapters.scale, route.interpret)
        term = LowRank(low_dy, jnp.swapaxes(adapters.a(False), 1, 2))
        da_ECR = factor_gradient(x, low_dy, sizes, adapters.rank, interpret=route.interpret)
        for n, pair, first in adapters:
            rank = pair.a.shape[-2]
            da = jnp.swapaxes(da_ECR[:, :, first : first + rank], 1, 2)
            db = factor_gradient(dys[n], low, sizes, rank, first, route.interpret)
            gradients[n] = Factors(
                da if pair.a.ndim == 3 else da.sum(axis=0),
                db if pair.b.ndim == 3 else db.sum(axis=0),
            )
    several = tuple(Term(dy, weight) for dy, weight in zip(dys, weights, strict=True))
    dx = route.multiply(several, sizes, Order.BY_COLUMN, term, layer)
    return (Operands(dx, None, None, None, tuple(gradients)),)  # pyright: ignore[reportArgumentType]


class _Adapters:
    """Those of several products as one: each has some of the columns of the rows' projection.

    Iterates over product, factors and first column.
    """

    def __init__(self, scales: tuple[float, ...], factors: tuple[Factors | None, ...]) -> None:
        self.factors = factors
        there = {scale for scale, pair in zip(scales, factors, strict=True) if pair is not None}
        # One scale is applied to the sums; of several, each to its factor, before that is rounded.
        self.scale = there.pop() if len(there) == 1 else 1.0
        self.rest = tuple(scale / self.scale for scale in scales)
        self.rank = sum(pair.a.shape[-2] for pair in factors if pair is not None)

    def __iter__(self) -> Iterator[tuple[int, Factors, int]]:
        first = 0
        for n, pair in enumerate(self.factors):
            if pair is not None:
                yield n, pair, first
                first += pair.a.shape[-2]

    def scaled(self, factor: Array, product: int) -> Array:
        """bf16 [G, …], multiplied by what `scale` leaves of the product's own."""
        rest = self.rest[product]
        return _by_group(factor if rest == 1.0 else factor * rest)

    def a(self, scaled: bool) -> Array:
        """bf16 [G, rank, in] of all."""
        each = [self.scaled(pair.a, n) if scaled else _by_group(pair.a) for n, pair, _ in self]
        groups = max(factor.shape[0] for factor in each)
        return jnp.concatenate(
            [jnp.broadcast_to(factor, (groups, *factor.shape[1:])) for factor in each], axis=1
        )

    def placed(self, b_GOR: Array, first: int) -> Array:
        """One product's [G, out, rank of all], with zeros for the ranks of the others."""
        after = self.rank - first - b_GOR.shape[2]
        return jnp.pad(b_GOR, ((0, 0), (0, 0), (first, after)))


def _by_group(factor: Array) -> Array:
    """bf16, with a leading axis of groups, or of one where the factor is shared."""
    return (factor if factor.ndim == 3 else factor[None]).astype(jnp.bfloat16)


products.defvjp(_forward, _backward)
