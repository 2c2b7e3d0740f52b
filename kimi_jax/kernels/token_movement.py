"""Tokens to the rows of their experts and back, by gathers in both directions of differentiation.

`dispatch` copies each token once for each of its K experts, sorted by expert; `combine` sums each
token's K rows. Each is the other's transpose, so neither derivative needs a scatter-add, whose
order, and so whose rounding, a GPU does not fix. Sums are fp32.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Order(NamedTuple):
    """Assignments (token, k) sorted by expert.

    assignment: [A] the flat assignment token · K + k that stands in each sorted row.
    row: [A] the sorted row of each flat assignment. group_sizes: [E] rows of each expert.
    """

    assignment: Int[Array, " A"]
    row: Int[Array, " A"]
    group_sizes: Int[Array, " E"]


def sort_by_expert(experts_TK: Int[Array, "tokens K"], num_experts: int) -> Order:
    """Sorts assignments by expert, keeping the order of tokens within an expert."""
    flat = experts_TK.reshape(-1)
    assignment = jnp.argsort(flat, stable=True)
    row = jnp.argsort(assignment)
    return Order(assignment, row, jnp.bincount(flat, length=num_experts))


def dispatch(x_TD: Float[Array, "tokens D"], order: Order, k: int) -> Float[Array, "A D"]:
    """Rows sorted by expert: row a is the token of the assignment that stands there. A = k · tokens."""
    return cast(Array, _dispatch(x_TD, order, k))


def combine(y_AD: Float[Array, "A D"], order: Order, k: int) -> Float[Array, "tokens D"]:
    """The sum of each token's k rows, in fp32, returned in the rows' dtype. A = k · tokens."""
    return cast(Array, _combine(y_AD, order, k))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(x_TD: Array, order: Order, k: int) -> Array:
    return x_TD[order.assignment // k]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(y_AD: Array, order: Order, k: int) -> Array:
    rows = y_AD[order.row].reshape(-1, k, y_AD.shape[-1])
    return rows.astype(jnp.float32).sum(axis=1).astype(y_AD.dtype)


def _dispatch_forward(x_TD: Array, order: Order, k: int) -> tuple[Array, Order]:
    return dispatch(x_TD, order, k), order


def _dispatch_backward(k: int, order: Order, dy_AD: Array) -> tuple[Array, None]:
    return combine(dy_AD, order, k), None


def _combine_forward(y_AD: Array, order: Order, k: int) -> tuple[Array, Order]:
    return combine(y_AD, order, k), order


def _combine_backward(k: int, order: Order, dy_TD: Array) -> tuple[Array, None]:
    return dispatch(dy_TD, order, k), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
_combine.defvjp(_combine_forward, _combine_backward)
