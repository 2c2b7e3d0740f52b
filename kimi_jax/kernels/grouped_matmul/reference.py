"""Grouped matmul in plain JAX: the specification that faster implementations are compared with.

    y[a] = x[a] · W[g(a)]ᵀ + s · (x[a] · A[g(a)]ᵀ) · B[g(a)]ᵀ

Rows are sorted by group. They are cut into tiles of one group each, so that the work is in
proportion to the rows, and one group's weight at a time is dequantised. Derivatives are JAX's own;
the tile's body is recomputed in the backward pass, so no dequantised weight is kept for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.int4 import dequantise
from kimi_jax.kernels.types import GroupedAdapter, GroupedWeight, PackedWeight

TILE_ROWS = 32


def grouped_matmul(
    x_AI: Float[Array, "A in"],
    weight: GroupedWeight,
    group_sizes_E: Int[Array, " E"],
    adapter: GroupedAdapter | None = None,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "A out"]:
    """Multiplies sorted rows by their group's weight; see `kimi_jax.kernels.api.grouped_matmul`."""
    tile_group, row_of_slot, slot_of_row = _cut_into_tiles(x_AI.shape[0], group_sizes_E)
    # One more row, of zeros, stands in for the empty places of a tile.
    padded = jnp.concatenate([x_AI, jnp.zeros_like(x_AI[:1])])
    tiles = padded[row_of_slot]

    @jax.checkpoint
    def multiply(x_tile: Array, group: Array) -> Array:
        y = jnp.einsum(
            "ai,oi->ao",
            x_tile,
            _group_weight(weight, group if layer is None else (layer, group), x_tile.dtype),
            preferred_element_type=jnp.float32,
        )
        if adapter is not None:
            a = adapter.a[group] if adapter.a.ndim == 3 else adapter.a
            b = adapter.b[group] if adapter.b.ndim == 3 else adapter.b
            low = jnp.einsum(
                "ai,ri->ar", x_tile, a.astype(x_tile.dtype), preferred_element_type=jnp.float32
            )
            y += adapter.scale * jnp.einsum(
                "ar,or->ao",
                low.astype(x_tile.dtype),
                b.astype(x_tile.dtype),
                preferred_element_type=jnp.float32,
            )
        return y.astype(x_tile.dtype)

    y_tiles = jax.lax.map(lambda pair: multiply(*pair), (tiles, tile_group))
    y = y_tiles.reshape(-1, y_tiles.shape[-1])[slot_of_row]
    # Rows behind the groups have a place in the last one's tile: what comes back for them, which may
    # be anything, must not get there.
    return jnp.where(jnp.arange(len(y))[:, None] < group_sizes_E.sum(), y, 0)


def _group_weight(weight: GroupedWeight, index: Any, dtype: jnp.dtype) -> Array:
    if isinstance(weight, PackedWeight):
        return dequantise(weight.values[index], weight.scale[index]).astype(dtype)
    return weight[index].astype(dtype)


def _cut_into_tiles(rows: int, group_sizes_E: Array) -> tuple[Array, Array, Array]:
    """Assigns rows to tiles of one group each; static shapes whatever the sizes are.

    Returns:
        The group of each tile [tiles]; the row of each place [tiles, TILE_ROWS], `rows` where it is
        empty; the flat place of each row [rows].
    """
    groups = group_sizes_E.shape[0]
    tiles = -(-rows // TILE_ROWS) + groups
    tiles_of_group = -(-group_sizes_E // TILE_ROWS)
    last_tile = jnp.cumsum(tiles_of_group)
    first_tile = last_tile - tiles_of_group
    last_row = jnp.cumsum(group_sizes_E)
    first_row = last_row - group_sizes_E
    tile = jnp.arange(tiles)
    tile_group = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), groups - 1)
    offset = (tile - first_tile[tile_group])[:, None] * TILE_ROWS + jnp.arange(TILE_ROWS)
    filled = (offset >= 0) & (offset < group_sizes_E[tile_group][:, None])
    row_of_slot = jnp.where(filled, first_row[tile_group][:, None] + offset, rows)
    row = jnp.arange(rows)
    row_group = jnp.minimum(jnp.searchsorted(last_row, row, side="right"), groups - 1)
    within = row - first_row[row_group]
    slot_of_row = first_tile[row_group] * TILE_ROWS + within
    return tile_group, row_of_slot, slot_of_row
