"""Expert parallelism that drops no token: rows of all ranks to the experts here, and back.

Every rank sees the rows of all and computes those assignments that its experts were chosen for, in
passes over a buffer of fixed size. Usually one pass holds them; a rank that was chosen more often
makes more passes, while memory stays what it was. The number of passes is not known before the step
runs, so the derivative is written here: it makes the same passes and computes each once more, but for
what it kept of the first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.recall import recalled
from kimi_jax.kernels.token_movement import (
    Order,
    add_window,
    combine,
    combine_window,
    dispatch,
    dispatch_window,
    sort_by_expert,
    window_sizes,
)
from kimi_jax.parallel.ranks import Ranks

ORDER = "expert_order"
"""The name under which a checkpoint policy finds the assignments' order."""

Compute = Callable[[Any, Any, Array, Array, Array, Any], tuple[Array, Any]]
"""`(trained, frozen, rows [C, D], routing weights [C], group sizes [e], known) -> rows [C, D], kept`.

Rows behind the groups are not part of any, and what comes out for them is ignored. They, and their
cotangents, are zeros as far as a kernel's tile reaches (`token_movement.scatter.CLEARED`), and may be
anything behind that. `kept` are results on the way, which need not be computed again for the
derivative if they come back as `known`; `known` is None the first time.
"""


class Operands(NamedTuple):
    """What the experts of this rank are applied to.

    trained, frozen: trees of arrays of `Compute`, the former differentiated. x: [N, D] the rows of all
    ranks. weights: [N, K] fp32 weights of their experts. order: their assignments by expert.
    """

    trained: Any
    frozen: Any
    x: Float[Array, "N D"]
    weights: Float[Array, "N K"]
    order: Order


def routed(
    ranks: Ranks,
    compute: Compute,
    trained: Any,
    frozen: Any,
    x_ND: Float[Array, "rows D"],
    experts_NK: Int[Array, "rows K"],
    weights_NK: Float[Array, "rows K"],
    num_experts: int,
) -> Float[Array, "rows D"]:
    """The weighted sum of each row's experts, for this rank's rows.

    Args:
        ranks: who shares the experts.
        compute: the experts of this rank.
        trained: tree of arrays of `compute` that are differentiated.
        frozen: tree of arrays of `compute` that are not.
        x_ND: this rank's rows.
        experts_NK: their experts, of all `num_experts`.
        weights_NK: fp32 weights of the experts.
        num_experts: experts of all ranks together.
    """
    x_ND, weights_NK = ranks.gather_rows(x_ND), ranks.gather_rows(weights_NK)
    here = num_experts // ranks.expert
    order = sort_by_expert(ranks.gather_rows(experts_NK), here, ranks.index() * here)
    order = Order(*(checkpoint_name(part, ORDER) for part in order))
    assignments = weights_NK.size
    capacity = ranks.buffer_rows(assignments) if ranks.rows == "split" else assignments
    operands = Operands(trained, frozen, x_ND, weights_NK, order)
    if ranks.expert == 1:
        y_ND = _all_here(compute, operands)
    elif capacity == assignments:
        y_ND = _one_pass(compute, capacity, operands, jnp.int32(0))[0]
    else:
        y_ND = cast(Array, _in_passes(compute, capacity, operands))
    return ranks.return_rows(y_ND)


def _all_here(compute: Compute, operands: Operands) -> Array:
    trained, frozen, x_ND, weights_NK, order = operands
    k = weights_NK.shape[1]
    weights_A = dispatch(weights_NK.reshape(-1, 1), order, 1)[:, 0]
    rows_AD = dispatch(x_ND, order, k)
    y_AD, _ = compute(trained, frozen, rows_AD, weights_A, order.group_sizes, None)
    return combine(y_AD, order, k)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_passes(compute: Compute, capacity: int, operands: Operands) -> Array:
    return _in_passes_forward(compute, capacity, operands)[0]


def _one_pass(
    compute: Compute, capacity: int, operands: Operands, start: Array, known: Any = None
) -> tuple[Array, Any]:
    """What the sorted assignments from `start` on, at most `capacity`, add to each row.

    Also what comes back as `known` where the same pass is differentiated: its rows, and `kept`.
    """
    order, k = operands.order, operands.weights.shape[1]
    rows_known, compute_known = known or (None, None)

    def gather(x_ND: Array) -> Array:
        return dispatch_window(x_ND, order, k, start, capacity)

    rows_CD = gather(operands.x) if known is None else recalled(gather, rows_known, operands.x)
    y_CD, kept = _computed(compute, operands, rows_CD, start, compute_known)
    return combine_window(y_CD, order, k, start), (rows_CD, kept)


def _computed(
    compute: Compute, operands: Operands, rows_CD: Array, start: Array, known: Any = None
) -> tuple[Array, Any]:
    """The experts of the rows of a pass, and `kept`."""
    trained, frozen, _, weights_NK, order = operands
    capacity = rows_CD.shape[0]
    weights_C = dispatch_window(weights_NK.reshape(-1, 1), order, 1, start, capacity)[:, 0]
    sizes = window_sizes(order.group_sizes, start, capacity)
    return compute(trained, frozen, rows_CD, weights_C, sizes, known)


def _with_further_passes(
    first: Any, add: Callable[[Any, Array], Any], capacity: int, total: Array
) -> Any:
    """`first`, and what passes from `capacity`, 2 · `capacity`, … below `total`, if any, add to it."""

    def more(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        start, summed = carry
        return start + capacity, add(summed, start)

    start = jnp.asarray(capacity, total.dtype)
    return jax.lax.while_loop(lambda carry: carry[0] < total, more, (start, first))[1]


def _in_passes_forward(
    compute: Compute, capacity: int, operands: Operands
) -> tuple[Array, tuple[Operands, Any]]:
    order, k = operands.order, operands.weights.shape[1]
    total = order.group_sizes.sum()
    first, kept = _one_pass(compute, capacity, operands, jnp.zeros_like(total))

    def add(summed_ND: Array, start: Array) -> Array:
        rows_CD = dispatch_window(operands.x, order, k, start, capacity)
        y_CD, _ = _computed(compute, operands, rows_CD, start)
        return add_window(summed_ND, y_CD, order, k, start)

    return _with_further_passes(first, add, capacity, total), (operands, kept)


def _in_passes_backward(
    compute: Compute, capacity: int, saved: tuple[Operands, Any], dy_ND: Array
) -> tuple[Operands]:
    operands, kept = saved
    order, k = operands.order, operands.weights.shape[1]
    total = order.group_sizes.sum()

    def first_pass(trained: Any, x_ND: Array, weights_NK: Array) -> Array:
        changed = operands._replace(trained=trained, x=x_ND, weights=weights_NK)
        return _one_pass(compute, capacity, changed, jnp.zeros_like(total), kept)[0]

    def add(summed: tuple[Any, Array, Array], start: Array) -> tuple[Any, Array, Array]:
        def further_pass(trained: Any, rows_CD: Array, weights_NK: Array) -> Array:
            changed = operands._replace(trained=trained, weights=weights_NK)
            y_CD, _ = _computed(compute, changed, rows_CD, start)
            return combine_window(y_CD, order, k, start)

        rows_CD = dispatch_window(operands.x, order, k, start, capacity)
        _, pullback = jax.vjp(further_pass, operands.trained, rows_CD, operands.weights)
        trained, d_rows_CD, weights = pullback(dy_ND)
        return (
            jax.tree.map(jnp.add, summed[0], trained),
            add_window(summed[1], d_rows_CD, order, k, start),
            summed[2] + weights,
        )

    first = jax.vjp(first_pass, operands.trained, operands.x, operands.weights)[1](dy_ND)
    trained, x, weights = _with_further_passes(first, add, capacity, total)
    return (Operands(trained, None, x, weights, None),)  # pyright: ignore[reportArgumentType]


_in_passes.defvjp(_in_passes_forward, _in_passes_backward)
