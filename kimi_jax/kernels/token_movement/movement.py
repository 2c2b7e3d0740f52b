"""Tokens to the rows of their experts and back, without scatter-add in either direction.

`dispatch` copies each token once for each of its K experts, sorted by expert; `combine` sums each
token's K rows. Each is the other's transpose, so neither derivative needs a scatter-add, whose
order, and so whose rounding, a GPU does not fix. Sums are fp32.

`dispatch_window` and `combine_window` do the same for some consecutive rows of the order, as one of
several devices needs it that share the experts: its buffer has a fixed capacity, and the sums over
all windows of all devices are what `combine` gives.

`impl` is `gather`, plain JAX, or `pallas`, kernels for Hopper GPUs that read what `gather` reads more
than once only once, and give the same bits; `auto` is the latter where it works.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.kernels.hopper import on_hopper

Implementation = Literal["auto", "gather", "pallas"]
KEYS = 2**32  # sorting keys are uint32


class Order(NamedTuple):
    """Assignments (token, k) sorted by expert; those of other devices' experts, if any, come last.

    assignment: [A] the flat assignment token · K + k that stands in each sorted row.
    row: [A] the sorted row of each flat assignment. group_sizes: [E] rows of each expert; the rows
    after their sum are other devices'.
    """

    assignment: Int[Array, " A"]
    row: Int[Array, " A"]
    group_sizes: Int[Array, " E"]


def sort_by_expert(
    experts_TK: Int[Array, "tokens K"], num_experts: int, first: Int[Array, ""] | int = 0
) -> Order:
    """Sorts assignments by expert, keeping the order of tokens within an expert.

    Args:
        experts_TK: each token's experts.
        num_experts: how many experts there are here.
        first: of the experts that are here. Assignments to experts outside of first …
            first + num_experts - 1 are sorted behind all others and counted nowhere.
    """
    group = experts_TK.reshape(-1) - first
    group = jnp.where((group >= 0) & (group < num_experts), group, num_experts)
    count = group.shape[0]
    assert (num_experts + 1) * count <= KEYS, f"{count} assignments, {num_experts} experts"
    # Group and place in one number: a sort of numbers alone is faster than one that carries others
    # along, and stable of itself.
    place = jnp.arange(count, dtype=jnp.uint32)
    keys = jnp.sort(group.astype(jnp.uint32) * jnp.uint32(count) + place, stable=False)
    assignment = (keys % jnp.uint32(max(count, 1))).astype(jnp.int32)
    # The inverse of a permutation: every place is written once, so the order of writing is nothing.
    row = (
        jnp.zeros(count, jnp.int32)
        .at[assignment]
        .set(place.astype(jnp.int32), unique_indices=True, mode="promise_in_bounds")
    )
    sizes = jnp.sum(group == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)
    return Order(assignment, row, sizes)


def dispatch(
    x_TD: Float[Array, "tokens D"], order: Order, k: int, impl: Implementation = "auto"
) -> Float[Array, "A D"]:
    """Rows sorted by expert: row a is the token of the assignment that stands there. A = k · tokens."""
    return cast(Array, _dispatch(x_TD, order, k, impl))


def combine(
    y_AD: Float[Array, "A D"], order: Order, k: int, impl: Implementation = "auto"
) -> Float[Array, "tokens D"]:
    """The sum of each token's k rows, in fp32, returned in the rows' dtype. A = k · tokens.

    Always by a gather, which reads each row once here; `impl` is that of the derivative.
    """
    return cast(Array, _combine(y_AD, order, k, impl))


def dispatch_window(
    x_TD: Float[Array, "tokens D"],
    order: Order,
    k: int,
    start: Int[Array, ""] | int,
    capacity: int,
    impl: Implementation = "auto",
) -> Float[Array, "C D"]:
    """Rows start … start + capacity - 1 of `dispatch`, without the others; capacity is static.

    Behind the last row that is this device's, rows are zero as far as a tile of a kernel may reach
    (`scatter.CLEARED`); what is behind them may be anything. No gradient flows through either.
    """
    return cast(Array, _dispatch_window(x_TD, order, jnp.int32(start), k, capacity, impl))


def combine_window(
    y_CD: Float[Array, "C D"],
    order: Order,
    k: int,
    start: Int[Array, ""] | int,
    impl: Implementation = "auto",
) -> Float[Array, "tokens D"]:
    """The sum of those of each token's k rows that stand at start … start + C - 1 and are ours.

    Summed in fp32, returned in the rows' dtype. Rows that are not ours may hold anything, NaN too.
    """
    return cast(Array, _combine_window(y_CD, order, jnp.int32(start), k, impl))


def add_window(
    onto_TD: Float[Array, "tokens D"],
    y_CD: Float[Array, "C D"],
    order: Order,
    k: int,
    start: Int[Array, ""] | int,
    impl: Implementation = "auto",
) -> Float[Array, "tokens D"]:
    """`onto` and what `combine_window` sums of the same window, rounded once; of one dtype.

    Not to be differentiated: the kernel cannot be. It reads and writes only the tokens that have rows in
    the window, in the memory of `onto` if nobody needs that any more.
    """
    assert onto_TD.dtype == y_CD.dtype
    begin, total = jnp.int32(start), order.group_sizes.sum()
    if kernel := _kernel(impl, "sums", y_CD):
        return kernel.sum_rows(y_CD, order.row, k, begin, total, onto_TD)
    summed = _fp32_sum_of_k(_rows_of_window(y_CD, order, begin, total), k)
    return (summed + onto_TD.astype(jnp.float32)).astype(onto_TD.dtype)


def window_sizes(
    group_sizes_E: Int[Array, " E"], start: Int[Array, ""] | int, capacity: int
) -> Int[Array, " E"]:
    """How many rows of each group stand in a window; their sum is less than capacity in the last one."""
    ends = jnp.cumsum(group_sizes_E)
    begins = ends - group_sizes_E
    inside = jnp.minimum(ends, start + capacity) - jnp.maximum(begins, start)
    return jnp.maximum(inside, 0).astype(group_sizes_E.dtype)


def _rows_of(values: Array, places: Array) -> Array:
    """A gather whose places are known to exist: nothing is clipped or filled in."""
    return values.at[places].get(mode="promise_in_bounds")


def _rows_or_zeros(values: Array, places: Array, exists: Array) -> Array:
    """Rows that exist, and zeros: a `where` would make an array of zeros that outlives the layer."""
    return values.at[jnp.where(exists, places, values.shape[0])].get(mode="fill", fill_value=0)


def _rows_of_window(y_CD: Array, order: Order, start: Array, total: Array) -> Array:
    """[A, D]: each assignment's row, zeros for one that is not in the window or not ours."""
    place = order.row - start
    inside = (place >= 0) & (place < jnp.minimum(y_CD.shape[0], total - start))
    return _rows_or_zeros(y_CD, place, inside)


def _fp32_sum_of_k(rows: Array, k: int) -> Array:
    return rows.reshape(-1, k, rows.shape[-1]).astype(jnp.float32).sum(axis=1)


def _kernel(impl: Implementation, name: Literal["scatter", "sums"], rows: Array) -> Any:
    """The module that moves these rows on Hopper, or None: by a gather."""
    if impl == "gather" or (impl == "auto" and not on_hopper()):
        return None
    # Imported when they are asked for: they bring in Mosaic GPU, which a CPU has no use for.
    from kimi_jax.kernels.token_movement import scatter, sums

    module = {"scatter": scatter, "sums": sums}[name]
    if module.takes(rows):
        return module
    if impl == "pallas":
        raise UserError(
            f"impl is 'pallas' and the rows are {rows.dtype}, {rows.shape[-1]} wide; required: "
            f"{module.REQUIRED}. Use impl='auto'"
        )
    return None


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dispatch(x_TD: Array, order: Order, k: int, impl: Implementation) -> Array:
    if kernel := _kernel(impl, "scatter", x_TD):
        rows = order.row.shape[0]
        return kernel.scatter_rows(x_TD, order.row, k, jnp.int32(0), jnp.int32(rows), rows)
    return _rows_of(x_TD, order.assignment // k)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _combine(y_AD: Array, order: Order, k: int, impl: Implementation) -> Array:
    del impl
    return _fp32_sum_of_k(_rows_of(y_AD, order.row), k).astype(y_AD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _dispatch_window(
    x_TD: Array, order: Order, start: Array, k: int, capacity: int, impl: Implementation
) -> Array:
    total = order.group_sizes.sum()
    if kernel := _kernel(impl, "scatter", x_TD):
        return kernel.scatter_rows(x_TD, order.row, k, start, total, capacity)
    ours = start + jnp.arange(capacity) < total
    # Padded, because a slice that reaches beyond the end would begin earlier.
    assignment = lax.dynamic_slice_in_dim(jnp.pad(order.assignment, (0, capacity)), start, capacity)
    return _rows_or_zeros(x_TD, assignment // k, ours)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _combine_window(y_CD: Array, order: Order, start: Array, k: int, impl: Implementation) -> Array:
    total = order.group_sizes.sum()
    if kernel := _kernel(impl, "sums", y_CD):
        return kernel.sum_rows(y_CD, order.row, k, start, total)
    return _fp32_sum_of_k(_rows_of_window(y_CD, order, start, total), k).astype(y_CD.dtype)


def _dispatch_forward(
    x_TD: Array, order: Order, k: int, impl: Implementation
) -> tuple[Array, Order]:
    return dispatch(x_TD, order, k, impl), order


def _dispatch_backward(
    k: int, impl: Implementation, order: Order, dy_AD: Array
) -> tuple[Array, None]:
    return combine(dy_AD, order, k, impl), None


def _combine_forward(
    y_AD: Array, order: Order, k: int, impl: Implementation
) -> tuple[Array, Order]:
    return combine(y_AD, order, k, impl), order


def _combine_backward(
    k: int, impl: Implementation, order: Order, dy_TD: Array
) -> tuple[Array, None]:
    return dispatch(dy_TD, order, k, impl), None


def _dispatch_window_forward(
    x_TD: Array, order: Order, start: Array, k: int, capacity: int, impl: Implementation
) -> tuple[Array, tuple[Order, Array]]:
    return dispatch_window(x_TD, order, k, start, capacity, impl), (order, start)


def _dispatch_window_backward(
    k: int, _: int, impl: Implementation, saved: tuple[Order, Array], dy_CD: Array
) -> tuple[Array, None, None]:
    order, start = saved
    # A start that is a constant comes back as NumPy's.
    return combine_window(dy_CD, order, k, jnp.asarray(start), impl), None, None


def _combine_window_forward(
    y_CD: Array, order: Order, start: Array, k: int, impl: Implementation
) -> tuple[Array, tuple[Order, Array, Array]]:
    # An array that tells the backward pass how many rows there were, and holds nothing.
    rows = jnp.zeros((y_CD.shape[0], 0), y_CD.dtype)
    return combine_window(y_CD, order, k, start, impl), (order, start, rows)


def _combine_window_backward(
    k: int, impl: Implementation, saved: tuple[Order, Array, Array], dy_TD: Array
) -> tuple[Array, None, None]:
    order, start, rows = saved
    start = jnp.asarray(start)  # as above
    return dispatch_window(dy_TD, order, k, start, rows.shape[0], impl), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
_combine.defvjp(_combine_forward, _combine_backward)
_dispatch_window.defvjp(_dispatch_window_forward, _dispatch_window_backward)
_combine_window.defvjp(_combine_window_forward, _combine_window_backward)
