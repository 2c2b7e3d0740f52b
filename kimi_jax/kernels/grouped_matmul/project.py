"""Rows times low-rank factors of their group on Hopper: the narrow product that reads rows once."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Int

from kimi_jax.kernels.grouped_matmul import fragments
from kimi_jax.kernels.grouped_matmul.lanes import CONTRACTION
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
from kimi_jax.kernels.grouped_matmul.schedule import FIRST, GROUP, ROWS, tile_table

TILE = 64  # rows
BLOCKS = 264  # two a multiprocessor: together they keep more copies in flight
STAGES = 6


class Narrow(NamedTuple):
    """A product with few features: rows, C a multiple of 64, and a factor of each group or one for all.

    At most 64 ranks.
    """

    rows: BFloat16[Array, "A C"]
    factor: BFloat16[Array, "G R C"]


@partial(jax.jit, static_argnames=("scale", "interpret"))
def project(
    terms: tuple[Narrow, ...],
    group_sizes_E: Int[Array, " E"],
    scale: float,
    interpret: bool = False,
) -> BFloat16[Array, "A 64"]:
    """scale · Σ x[a] · P[g(a)]ᵀ over terms, rounded once, with zeros beyond the rank.

    Args:
        terms: rows sorted by group, and their factors P, all of the same rank.
        group_sizes_E: int32, summing to A.
        scale: multiplies the sum.
        interpret: run on the CPU.
    """
    rows = terms[0].rows.shape[0]
    (rank,) = {term.factor.shape[1] for term in terms}
    padding = -rank % 8
    factors = [jnp.pad(term.factor, ((0, 0), (0, padding), (0, 0))) for term in terms]
    rank += padding
    table, count = tile_table(group_sizes_E, rows, (TILE,))
    plan = _Plan(
        rank,
        tuple(factor.shape[0] == 1 for factor in factors),
        tuple(factor.shape[2] // CONTRACTION for factor in factors),
        scale,
        interpret,
    )
    kernel = launch(
        "grouped_project" + "_pair" * (len(terms) - 1),
        plan.run,
        jax.ShapeDtypeStruct((rows, CONTRACTION), jnp.bfloat16),
        plan.blocks,
        2,
        {
            "x_smem": rows_memory((STAGES, TILE, CONTRACTION), interpret),
            "factor_smem": plgpu.SMEM(
                (STAGES, rank, CONTRACTION), jnp.bfloat16, transforms=OPERAND
            ),
            **Ring.barriers(STAGES, copies=2, computing=1),
        },
        interpret,
        moved=sum(term.rows.nbytes for term in terms),
    )
    return kernel(
        table,
        count,
        *(term.rows for term in terms),
        *(factor.reshape(-1, factor.shape[2]) for factor in factors),
    )


@dataclass(frozen=True)
class _Plan:
    """shared: whether a term's factor is the same for all groups. steps: of a term's contraction."""

    rank: int
    shared: tuple[bool, ...]
    steps: tuple[int, ...]
    scale: float
    interpret: bool

    @property
    def blocks(self) -> int:
        return 2 if self.interpret else BLOCKS

    def run(
        self,
        table: Any,
        count: Any,
        *operands: Any,
        x_smem: Any,
        factor_smem: Any,
        full: Any,
        empty: Any,
    ) -> None:
        *several, low = operands
        xs, factors = several[: len(self.steps)], several[len(self.steps) :]
        to_write, to_read = both_views(x_smem, self.interpret)

        ring = Ring(STAGES, full, empty)

        def move(tile: Any, step: Any) -> Any:
            first, group = table[tile, FIRST], table[tile, GROUP]

            def copy(x: Any, factor: Any, row: Any, k: Any, slot: Any, barrier: Any) -> None:
                columns = pl.ds(k * CONTRACTION, CONTRACTION)
                x_from = x.at[pl.ds(first, TILE), columns]
                factor_from = factor.at[pl.ds(row, self.rank), columns]
                plgpu.copy_gmem_to_smem(x_from, to_write.at[slot], barrier)
                plgpu.copy_gmem_to_smem(factor_from, factor_smem.at[slot], barrier)

            for x, factor, shared, steps in zip(xs, factors, self.shared, self.steps, strict=True):
                row = group * (0 if shared else self.rank)
                step = ring.fill(step, steps, partial(copy, x, factor, row))
            return step

        def compute(tile: Any, step: Any) -> Any:
            def accumulate(acc: Any) -> None:
                def work(slot: Any) -> None:
                    plgpu.wgmma(acc, to_read.at[slot], factor_smem.at[slot].T)
                    plgpu.wgmma_wait(0)

                ring.use(step, sum(self.steps), work)
                store = _store_plainly if self.interpret else fragments.store_low
                store(acc[...], low, table[tile, FIRST], table[tile, ROWS], self.scale)

            pl.run_scoped(accumulate, Accumulator((TILE, self.rank), jnp.float32))
            return step + sum(self.steps)

        specialise(
            1,
            STAGES,
            empty,
            lambda: share(count[0], self.blocks, move),
            lambda: share(count[0], self.blocks, compute),
        )


def _store_plainly(acc: Any, low: Any, first: Any, rows: Any, scale: float) -> None:
    """`fragments.store_low` in what the interpreter knows."""
    missing = CONTRACTION - acc.shape[1]
    padded = jnp.pad((acc * scale).astype(jnp.bfloat16), ((0, 0), (0, missing)))

    def store(row: Any, _: None) -> None:
        low[pl.ds(first + row, 1)] = lax.dynamic_slice_in_dim(padded, row, 1)

    lax.fori_loop(0, rows, store, None)
