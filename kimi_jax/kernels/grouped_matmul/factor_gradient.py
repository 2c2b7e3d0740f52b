"""Sums of outer products over each group's rows on Hopper: gradients of low-rank factors."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32, Int

from kimi_jax.kernels.grouped_matmul import fragments
from kimi_jax.kernels.grouped_matmul.lanes import CONTRACTION, FEATURES
from kimi_jax.kernels.grouped_matmul.pipeline import (
    OPERAND,
    Accumulator,
    Ring,
    both_views,
    launch,
    rows_memory,
    share,
    specialise,
)

TILE = 64  # rows
BLOCKS = 264  # two a multiprocessor, where their shared memory fits
STAGES = 6


@partial(jax.jit, static_argnames=("rank", "first", "interpret"))
def factor_gradient(
    x_AC: BFloat16[Array, "A C"],
    low_AL: BFloat16[Array, "A L"],
    group_sizes_E: Int[Array, " E"],
    rank: int,
    first: int = 0,
    interpret: bool = False,
) -> Float32[Array, "E C rank"]:
    """Σ over a group's rows of x[a] ⊗ low[a], fp32; zero for an empty group.

    Args:
        x_AC: rows sorted by group, C a multiple of 128; finite, and so are the `TILE` rows behind them.
        low_AL: what `project` made; `rank` of its columns count.
        group_sizes_E: int32, summing to A.
        rank: at most 64.
        first: the first of these columns.
        interpret: run on the CPU.
    """
    rows, columns = x_AC.shape
    groups = group_sizes_E.shape[0]
    padded = rank + -rank % 8
    tiles_of_group = -(-group_sizes_E // TILE)
    first_tile = jnp.cumsum(tiles_of_group) - tiles_of_group
    first_row = jnp.cumsum(group_sizes_E) - group_sizes_E
    table = jnp.stack([first_row, first_tile, tiles_of_group], axis=1).astype(jnp.int32)
    low_AR = jnp.pad(low_AL[:, first : first + rank], ((0, 0), (0, padded - rank)))
    low = _by_tile(low_AR, table, group_sizes_E, rows // TILE + groups)
    plan = _Plan(padded, columns // FEATURES, groups, interpret)
    kernel = launch(
        "grouped_factor_gradient",
        plan.run,
        jax.ShapeDtypeStruct((groups * columns, padded), jnp.float32),
        plan.grid,
        3,
        {
            "x_smem": rows_memory((STAGES, 2, TILE, CONTRACTION), interpret),
            "low_smem": plgpu.SMEM((STAGES, padded, TILE), jnp.bfloat16, transforms=OPERAND),
            **Ring.barriers(STAGES, copies=3, computing=2),
        },
        interpret,
        moved=x_AC.nbytes,
    )
    sums = kernel(table, x_AC, low)
    return sums.reshape(groups, columns, padded)[:, :, :rank]


def _by_tile(low_AR: Array, table: Array, group_sizes: Array, tiles: int) -> Array:
    """[tiles · R, TILE]: each group's rows from its own first one, zeros after its last."""
    tile = jnp.arange(tiles)
    last_tile = table[:, 1] + table[:, 2]
    group = jnp.minimum(jnp.sum(last_tile <= tile[:, None], axis=1), table.shape[0] - 1)
    within = (tile - table[group, 1])[:, None] * TILE + jnp.arange(TILE)
    row = jnp.minimum(table[group, 0][:, None] + within, low_AR.shape[0] - 1)
    valid = within < group_sizes[group][:, None]
    by_tile = jnp.where(valid[:, :, None], low_AR[row], 0)
    return by_tile.transpose(0, 2, 1).reshape(-1, TILE)


@dataclass(frozen=True)
class _Plan:
    """An item of work is a group and a block of 128 columns; its steps are tiles of 64 rows."""

    rank: int
    blocks: int
    groups: int
    interpret: bool

    @property
    def grid(self) -> int:
        return 2 if self.interpret else BLOCKS

    def run(
        self,
        table: Any,
        x: Any,
        low: Any,
        sums: Any,
        x_smem: Any,
        low_smem: Any,
        full: Any,
        empty: Any,
    ) -> None:
        warpgroup = lax.axis_index("warpgroup")
        to_write, to_read = both_views(x_smem, self.interpret)

        ring = Ring(STAGES, full, empty)

        def move(item: Any, step: Any) -> Any:
            group, block = (f(item, jnp.int32(self.blocks)) for f in (lax.div, lax.rem))
            row, tile, count = (table[group, n] for n in range(3))

            def copy(k: Any, slot: Any, barrier: Any) -> None:
                for half in range(2):
                    column = pl.ds(block * FEATURES + half * CONTRACTION, CONTRACTION)
                    x_from = x.at[pl.ds(row + k * TILE, TILE), column]
                    plgpu.copy_gmem_to_smem(x_from, to_write.at[slot, half], barrier)
                low_from = low.at[pl.ds((tile + k) * self.rank, self.rank)]
                plgpu.copy_gmem_to_smem(low_from, low_smem.at[slot], barrier)

            return ring.fill(step, count, copy)

        def compute(item: Any, step: Any) -> Any:
            count = table[lax.div(item, jnp.int32(self.blocks)), 2]

            def accumulate(acc: Any) -> None:
                def work(slot: Any) -> None:
                    plgpu.wgmma(acc, to_read.at[slot, warpgroup].T, low_smem.at[slot].T)
                    plgpu.wgmma_wait(0)

                ring.use(step, count, work)
                first = item * FEATURES + warpgroup * CONTRACTION
                if self.interpret:
                    sums[pl.ds(first, CONTRACTION)] = acc[...]
                else:
                    fragments.store_sums(acc[...], sums, first)

            pl.run_scoped(accumulate, Accumulator((CONTRACTION, self.rank), jnp.float32))
            return step + count

        items = jnp.int32(self.groups * self.blocks)
        specialise(
            2,
            STAGES,
            empty,
            lambda: share(items, self.grid, move),
            lambda: share(items, self.grid, compute),
        )
