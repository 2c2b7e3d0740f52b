"""Which rows a block works on: groups cut into tiles of the widths that the kernel is compiled for."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

GROUP, FIRST, ROWS, WIDTH = range(4)  # fields of a tile


def tile_table(
    group_sizes_E: Int[Array, " E"], rows: int, widths: Sequence[int]
) -> tuple[Int[Array, "tiles fields"], Int[Array, "1"]]:
    """Cuts each group into tiles of the widest width and one narrower tile for what is left.

    Sorted by width, widest first, so that dealing them out in turn balances the blocks.

    Args:
        group_sizes_E: rows of each group, int32; they sum to at most `rows`.
        rows: static number of rows.
        widths: ascending; the last is the width of full tiles.

    Returns:
        [tiles, 4] int32: group, first row, rows, index of the smallest sufficient width; and the
        number of tiles that exist, the rest of the table being without meaning.
    """
    groups = group_sizes_E.shape[0]
    widest = widths[-1]
    group = jnp.arange(groups, dtype=jnp.int32)
    tile = jnp.arange(rows // widest + groups, dtype=jnp.int32)
    # Sums over comparisons instead of scans, searches and sorts: small, and XLA fuses them.
    earlier = group[:, None] >= group
    of_group = -(-group_sizes_E // widest)
    last_tile = jnp.sum(jnp.where(earlier, of_group, 0), axis=1)
    last_row = jnp.sum(jnp.where(earlier, group_sizes_E, 0), axis=1)
    of_tile = jnp.sum(last_tile <= tile[:, None], axis=1)
    mine = of_tile[:, None] == group
    offset = (tile - jnp.sum(jnp.where(mine, last_tile - of_group, 0), axis=1)) * widest
    size = jnp.sum(jnp.where(mine, group_sizes_E, 0), axis=1)
    first = jnp.sum(jnp.where(mine, last_row - group_sizes_E, 0), axis=1) + offset
    length = jnp.clip(size - offset, 0, widest)
    width = jnp.sum(length[:, None] > jnp.array(widths), axis=1)
    key = jnp.where(of_tile < groups, -width, 1)
    place = (key[:, None] > key) | ((key[:, None] == key) & (tile[:, None] > tile))
    chosen = jnp.sum(place, axis=1) == tile[:, None]
    fields = jnp.stack([of_tile, first, length, width], axis=1)
    table = jnp.sum(jnp.where(chosen[:, :, None], fields, 0), axis=1)
    return table.astype(jnp.int32), last_tile[-1:].astype(jnp.int32)
