"""Linear layers whose adapters are more columns, or rows, of their weights.

An adapter's own products are thin: at rank 8 they cost what reading and writing x and y costs. So
its term is computed where y is computed anyway, and joins what is smaller:

- Where all weights' outputs are wider than the input, y = [x, x · Aᵀ] · [W, s · B]ᵀ is one product,
  and its derivative gives those of x and of x · Aᵀ in one reading of dy.
- Where they are narrower, dx = [dy, s · dy · B] · [W; A] is one product over all weights: no term of it
  is written by itself. Forward, the term is added to y.

The weights are frozen. Products are accumulated in fp32; of a joined one, the whole sum is rounded.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kimi_jax.kernels.linear.reference import product
from kimi_jax.kernels.types import LinearAdapter

LOW_RANK = "low_rank"
"""The name under which a checkpoint policy finds x · Aᵀ, which is small beside x."""

MULTIPLE = 16  # of the ranks in a joined product: what tensor cores contract, and a memory sector


class Factors(NamedTuple):
    """Of one adapter, fp32."""

    a: Float[Array, "r in"]
    b: Float[Array, "out r"]


class _Operands(NamedTuple):
    """Of products of the same rows: the weight of each, and its adapter's factors or None."""

    x: Array
    weights: tuple[Array, ...]
    factors: tuple[Factors | None, ...]


def linear(
    x: Float[Array, "*tokens in"],
    weights: tuple[Float[Array, "_ in"], ...],
    adapters: tuple[LinearAdapter | None, ...],
) -> tuple[Float[Array, "*tokens _"], ...]:
    """Each weight's product; see `kimi_jax.kernels.api.linear`."""
    scales = tuple(1.0 if adapter is None else adapter.scale for adapter in adapters)
    factors = tuple(adapter and Factors(adapter.a, adapter.b) for adapter in adapters)
    rows = x.reshape(-1, x.shape[-1])
    ys: Any = _products(scales, _Operands(rows, weights, factors))
    return tuple(y.reshape(*x.shape[:-1], -1) for y in ys)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(scales: tuple[float, ...], operands: _Operands) -> tuple[Array, ...]:
    return _forward(scales, operands)[0]


def _forward(
    scales: tuple[float, ...], operands: _Operands
) -> tuple[tuple[Array, ...], tuple[_Operands, Array | None]]:
    x, weights, _ = operands
    join = _Join(scales, operands)
    if not join.ranks:
        return tuple(product(x, weight) for weight in weights), (operands, None)
    low = checkpoint_name(product(x, join.a), LOW_RANK)
    if join.widens:
        joined = padded([x, low], axis=1)
        ys = tuple(product(joined, weight) for weight in join.weights)
    else:
        ys = tuple(
            y if b is None else _sum(y, product(low[:, columns], b), x.dtype)
            for y, b, columns in zip(
                (product(x, weight) for weight in weights), join.b, join.columns, strict=True
            )
        )
    return ys, (operands, low)


def _backward(
    scales: tuple[float, ...], saved: tuple[_Operands, Array | None], dys: tuple[Array, ...]
) -> tuple[_Operands]:
    operands, low = saved
    x, weights, factors = operands
    join = _Join(scales, operands)
    f32 = jnp.float32
    rows = [weight.astype(x.dtype) for weight in weights]
    if low is None:
        first, *others = map(_pull_back, dys, rows)
        dx = sum(others, first)
        return (_Operands(dx, None, (None,) * len(factors)),)  # pyright: ignore[reportArgumentType]
    if join.widens:
        first, *others = map(_pull_back, dys, join.weights)
        d_joined = sum(others, first)
        width = x.shape[1]
        d_low = d_joined[:, width : width + join.ranks]
        dx = _sum(d_joined[:, :width], _pull_back(d_low, join.a), x.dtype)
    else:
        thin = [_pull_back(dy, b) for dy, b in zip(dys, join.b, strict=True) if b is not None]
        d_low = jnp.concatenate(thin, axis=1)
        dx = _pull_back(padded([*dys, d_low], axis=1), padded([*rows, join.a], axis=0))
    da = jnp.einsum("tr,ti->ri", d_low, x, preferred_element_type=f32)
    gradients = [
        pair
        and Factors(
            da[columns],
            scale * jnp.einsum("to,tr->or", dy, low[:, columns], preferred_element_type=f32),
        )
        for pair, scale, dy, columns in zip(factors, scales, dys, join.columns, strict=True)
    ]
    return (_Operands(dx, None, tuple(gradients)),)  # pyright: ignore[reportArgumentType]


_products.defvjp(_forward, _backward)


class _Join:
    """Factors and weights of several products, in the rows' dtype, put together.

    ranks: of all adapters. columns: of them, each product's. a: [ranks, in]. b: each product's, with
    its scale, or None. widens: whether outputs together are wider than the input.
    """

    def __init__(self, scales: tuple[float, ...], operands: _Operands) -> None:
        x, weights, factors = operands
        self.dtype = x.dtype
        self._weights = weights
        self.widens = sum(weight.shape[0] for weight in weights) > x.shape[1]
        self.columns, self.ranks = [], 0
        for pair in factors:
            after = self.ranks + (0 if pair is None else pair.a.shape[0])
            self.columns.append(slice(self.ranks, after))
            self.ranks = after
        # A scale is multiplied in before the factor is rounded.
        self.b = [
            pair and (scale * pair.b).astype(x.dtype)
            for pair, scale in zip(factors, scales, strict=True)
        ]
        rows = [pair.a.astype(x.dtype) for pair in factors if pair is not None]
        self.a = jnp.concatenate(rows) if rows else jnp.zeros((0, x.shape[1]), x.dtype)

    @property
    def weights(self) -> list[Array]:
        """Each product's weight, then its b, with zeros for the ranks of the others."""
        joined = []
        for weight, b, columns in zip(self._weights, self.b, self.columns, strict=True):
            if b is None:
                b = jnp.zeros((weight.shape[0], 0), self.dtype)
            placed = jnp.pad(b, ((0, 0), (columns.start, self.ranks - columns.stop)))
            joined.append(padded([weight.astype(self.dtype), placed], axis=1))
        return joined


def padded(parts: list[Array], axis: int) -> Array:
    """Parts beside each other, the last of them an adapter's, or several's, with zeros up to `MULTIPLE`."""
    last = parts[-1]
    shape = list(last.shape)
    shape[axis] = -shape[axis] % MULTIPLE
    return jnp.concatenate([*parts, jnp.zeros(shape, last.dtype)], axis)


def _pull_back(dy: Array, weight: Array) -> Array:
    return jnp.einsum("to,oi->ti", dy, weight)


def _sum(left: Array, right: Array, dtype: jnp.dtype) -> Array:
    """In fp32, rounded once."""
    return (left.astype(jnp.float32) + right.astype(jnp.float32)).astype(dtype)
