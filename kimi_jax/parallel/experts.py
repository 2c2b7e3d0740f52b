"""Expert parallelism that drops no token: rows of all ranks to the experts here, and back.

Every rank sees the rows of all and computes those assignments that its experts were chosen for, in
passes over a buffer of fixed size. Usually one pass holds them; a rank that was chosen more often
makes more passes, while memory stays what it was. The number of passes is not known before the step
runs, so the derivative is written here: it makes the same passes and computes each once more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.token_movement import (
    Order,
    combine,
    combine_window,
    dispatch,
    dispatch_window,
    sort_by_expert,
    window_sizes,
)
from kimi_jax.parallel.ranks import Ranks

Compute = Callable[[Any, Any, Array, Array, Array], Array]
"""`(trained, frozen, rows [C, D], routing weights [C], group sizes [e]) -> rows [C, D]`.

Rows behind the groups are not part of any, and what comes out for them is ignored.
"""


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
    assignments = weights_NK.size
    capacity = ranks.buffer_rows(assignments) if ranks.rows == "split" else assignments
    operands = (trained, frozen, x_ND, weights_NK, order)
    if ranks.expert == 1:
        y_ND = _all_here(compute, *operands)
    elif capacity == assignments:
        y_ND = _one_pass(compute, capacity, *operands, jnp.int32(0))
    else:
        y_ND = cast(Array, _in_passes(compute, capacity, *operands))
    return ranks.return_rows(y_ND)


def _all_here(
    compute: Compute, trained: Any, frozen: Any, x_ND: Array, weights_NK: Array, order: Order
) -> Array:
    k = weights_NK.shape[1]
    weights_A = dispatch(weights_NK.reshape(-1, 1), order, 1)[:, 0]
    y_AD = compute(trained, frozen, dispatch(x_ND, order, k), weights_A, order.group_sizes)
    return combine(y_AD, order, k)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_passes(
    compute: Compute,
    capacity: int,
    trained: Any,
    frozen: Any,
    x_ND: Array,
    weights_NK: Array,
    order: Order,
) -> Array:
    def one_pass(start: Array) -> Array:
        return _one_pass(compute, capacity, trained, frozen, x_ND, weights_NK, order, start)

    return _sum_of_passes(one_pass, capacity, order.group_sizes.sum())


def _one_pass(
    compute: Compute,
    capacity: int,
    trained: Any,
    frozen: Any,
    x_ND: Array,
    weights_NK: Array,
    order: Order,
    start: Array,
) -> Array:
    """What the sorted assignments from `start` on, at most `capacity`, add to each row."""
    k = weights_NK.shape[1]
    rows_CD = dispatch_window(x_ND, order, k, start, capacity)
    weights_C = dispatch_window(weights_NK.reshape(-1, 1), order, 1, start, capacity)[:, 0]
    sizes = window_sizes(order.group_sizes, start, capacity)
    y_CD = compute(trained, frozen, rows_CD, weights_C, sizes)
    return combine_window(y_CD, order, k, start)


def _sum_of_passes(one_pass: Callable[[Array], Any], capacity: int, total: Array) -> Any:
    """Σ one_pass(0), one_pass(capacity), … below `total`: the first always, the others as needed."""

    def more(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        start, summed = carry
        return start + capacity, jax.tree.map(jnp.add, summed, one_pass(start))

    first = one_pass(jnp.zeros_like(total))
    start = jnp.asarray(capacity, total.dtype)
    return jax.lax.while_loop(lambda carry: carry[0] < total, more, (start, first))[1]


def _in_passes_forward(
    compute: Compute,
    capacity: int,
    trained: Any,
    frozen: Any,
    x_ND: Array,
    weights_NK: Array,
    order: Order,
) -> tuple[Array, Any]:
    y_ND = _in_passes(compute, capacity, trained, frozen, x_ND, weights_NK, order)
    return cast(Array, y_ND), (trained, frozen, x_ND, weights_NK, order)


def _in_passes_backward(
    compute: Compute, capacity: int, saved: Any, dy_ND: Array
) -> tuple[Any, None, Array, Array, None]:
    trained, frozen, x_ND, weights_NK, order = saved

    def one_pass(start: Array) -> Any:
        def forward(trained: Any, x_ND: Array, weights_NK: Array) -> Array:
            return _one_pass(compute, capacity, trained, frozen, x_ND, weights_NK, order, start)

        return jax.vjp(forward, trained, x_ND, weights_NK)[1](dy_ND)

    d_trained, dx_ND, d_weights_NK = _sum_of_passes(one_pass, capacity, order.group_sizes.sum())
    return d_trained, None, dx_ND, d_weights_NK, None


_in_passes.defvjp(_in_passes_forward, _in_passes_backward)
