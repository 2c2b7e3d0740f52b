"""Tokens to the rows of their experts and back; `movement` says how."""

from kimi_jax.kernels.token_movement.movement import (
    Implementation,
    Order,
    add_window,
    combine,
    combine_window,
    dispatch,
    dispatch_window,
    sort_by_expert,
    window_sizes,
)

__all__ = [
    "Implementation",
    "Order",
    "add_window",
    "combine",
    "combine_window",
    "dispatch",
    "dispatch_window",
    "sort_by_expert",
    "window_sizes",
]
