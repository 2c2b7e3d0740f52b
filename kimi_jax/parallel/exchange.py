"""The two exchanges of rows between ranks, each the other's transpose, in two ways.

`sums`: an all-gather and a reduce-scatter. `copies`: an all-gather and an all-to-all, whose parts are
then added here, in fp32: what travels is copied and nothing more, which a GPU's copy engines can do
while kernels hold all of its multiprocessors. Adding on the way takes multiprocessors.
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from kimi_jax.config import Exchange


def gather(x_ND: Shaped[Array, "rows ..."], axis: str, way: Exchange) -> Shaped[Array, "all ..."]:
    """Every rank's rows, one after the other; its derivative is `scatter_sum` in the same way."""
    if way == "sums" or not jnp.issubdtype(x_ND.dtype, jnp.floating):
        return lax.all_gather(x_ND, axis, tiled=True)
    return cast(Array, _gather_copies(axis, x_ND))


def scatter_sum(
    x_ND: Shaped[Array, "all ..."], axis: str, way: Exchange
) -> Shaped[Array, "rows ..."]:
    """The sum over ranks, of which each keeps its part; its derivative is `gather` in the same way."""
    if way == "sums":
        return lax.psum_scatter(x_ND, axis, tiled=True)
    return cast(Array, _sum_copies(axis, x_ND))


def _copied_parts(axis: str, x_ND: Array) -> Array:
    """This rank's part of every rank's rows, added up."""
    parts = x_ND.reshape(lax.axis_size(axis), -1, *x_ND.shape[1:])
    received = lax.all_to_all(parts, axis, 0, 0)
    return received.astype(jnp.float32).sum(axis=0).astype(x_ND.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_copies(axis: str, x_ND: Array) -> Array:
    return lax.all_gather(x_ND, axis, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_copies(axis: str, x_ND: Array) -> Array:
    return _copied_parts(axis, x_ND)


def _gather_forward(axis: str, x_ND: Array) -> tuple[Any, None]:
    return _gather_copies(axis, x_ND), None


def _gather_backward(axis: str, _: None, dy_ND: Array) -> tuple[Array]:
    return (_copied_parts(axis, dy_ND),)


def _sum_forward(axis: str, x_ND: Array) -> tuple[Any, None]:
    return _sum_copies(axis, x_ND), None


def _sum_backward(axis: str, _: None, dy_ND: Array) -> tuple[Array]:
    return (lax.all_gather(dy_ND, axis, tiled=True),)


_gather_copies.defvjp(_gather_forward, _gather_backward)
_sum_copies.defvjp(_sum_forward, _sum_backward)
