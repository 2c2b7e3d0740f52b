"""The code of the packed grouped matmul's kernel.

A block of three warpgroups computes 128 features × up to 256 rows: one moves rows, packed weights
and scales into shared memory, two decode weights into registers and multiply. The weight is WGMMA's
A operand, so an accumulator is a transposed tile of the product. Decoding a step's weights runs
while the tensor cores still work on the step before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.kernels.grouped_matmul import fragments
from kimi_jax.kernels.grouped_matmul.fragments import Order
from kimi_jax.kernels.grouped_matmul.lanes import CONTRACTION, FEATURES, WARPGROUP_FEATURES
from kimi_jax.kernels.grouped_matmul.pipeline import (
    Accumulator,
    both_views,
    share,
    sliced,
    specialise,
)
from kimi_jax.kernels.grouped_matmul.schedule import FIRST, GROUP, ROWS, WIDTH

COMPUTING = 2  # warpgroups
MEMORY_REGISTERS = 40
# Of the 168 that each of three warpgroups is launched with: more than (3 · 168 - 40) / 2 would wait
# for registers that nobody releases.
COMPUTE_REGISTERS = 232


@dataclass(frozen=True)
class Tuning:
    """Shapes of the pipeline.

    widths: rows of the tiles that it is compiled for, ascending multiples of 16, at most 256.
    stages: steps of 64 of the contraction in flight. blocks: one for each multiprocessor. turns: so
    many times as many blocks are launched, one after the other: where an exchange between GPUs holds
    some multiprocessors, those that are free take more blocks, and none waits for a whole product.
    """

    widths: tuple[int, ...] = (64, 128, 192, 256)
    stages: int = 5
    blocks: int = 132
    turns: int = 4


@dataclass(frozen=True)
class Plan:
    """What the kernel's code is specialised for.

    blocks: of features. steps: of each term's contraction. low_rank: whether there is such a term.
    """

    order: Order
    tuning: Tuning
    blocks: int
    steps: tuple[int, ...]
    low_rank: bool
    interpret: bool

    def run(self, table: Any, counts: Any, *operands: Any, **scratch: Any) -> None:
        """The kernel. operands: three for each term, two of a low-rank term, the product."""
        *several, y = operands
        low, factor = several[-2:] if self.low_rank else (None, None)
        terms = []
        for n, steps in enumerate(self.steps):
            x, values, scale = several[3 * n : 3 * n + 3]
            terms.append(_Term(x, values, scale, steps))
        _Kernel(self, table, counts, tuple(terms), low, factor, y, **scratch).run()


@dataclass(frozen=True)
class _Term:
    """What is multiplied in so many steps; in global memory."""

    x: Any
    values: Any  # [layers · E · out, in]
    scale: Any  # [layers · E · in/32, out]
    steps: int

    def weight(self, order: Order, group: Any, block: Any, k: Any) -> tuple[Any, Any]:
        """A step's slices of values and scales for 128 features."""
        out, width_in = self.scale.shape[1], self.values.shape[1]
        features = pl.ds(block * FEATURES, FEATURES)
        contracted = pl.ds(k * CONTRACTION, CONTRACTION)
        row, scale_row = group * out, group * (width_in // GROUP_SIZE)
        if order is Order.BY_ROW:
            scales = CONTRACTION // GROUP_SIZE
            return (
                self.values.at[pl.ds(row + block * FEATURES, FEATURES), contracted],
                self.scale.at[pl.ds(scale_row + k * scales, scales), features],
            )
        scales = FEATURES // GROUP_SIZE
        return (
            self.values.at[pl.ds(row + k * CONTRACTION, CONTRACTION), features],
            self.scale.at[pl.ds(scale_row + block * scales, scales), contracted],
        )


@dataclass(frozen=True)
class _Kernel:
    """References in global memory, then in shared memory, then barriers; see `multiply`."""

    plan: Plan
    table: Any
    counts: Any  # tiles; the layer's first group
    terms: tuple[_Term, ...]
    low: Any
    factor: Any
    y: Any
    x_smem: Any
    values_smem: Any
    scale_smem: Any
    stage_smem: Any
    full: Any
    empty: Any

    def run(self) -> None:
        """The last warpgroup moves, the others compute."""
        tuning = self.plan.tuning
        specialise(
            COMPUTING,
            tuning.stages,
            self.empty,
            lambda: self.for_each_tile(self.move),
            lambda: self.for_each_tile(self.compute),
            (MEMORY_REGISTERS, COMPUTE_REGISTERS),
        )

    def for_each_tile(self, work: Callable[..., None]) -> None:
        """Calls work(width, tile, block of features, first step) for this block's share."""
        plan = self.plan
        steps_of_tile = sum(plan.steps) + plan.low_rank

        def one(item: Any, step: Any) -> Any:
            tile, block = (f(item, jnp.int32(plan.blocks)) for f in (lax.div, lax.rem))
            for index, width in enumerate(plan.tuning.widths):

                @pl.when(self.table[tile, WIDTH] == index)
                def _(width: int = width) -> None:
                    work(width, tile, block, step)

            return step + steps_of_tile

        share(self.counts[0] * plan.blocks, plan.tuning.blocks, one, plan.tuning.turns)

    def slot(self, step: Any) -> Any:
        """Where a step's operands stand."""
        return lax.rem(step, jnp.int32(self.plan.tuning.stages))

    def move(self, width: int, tile: Any, block: Any, step: Any) -> None:
        """Copies a tile's operands, step by step, as slots become empty."""
        to_write, _ = both_views(self.x_smem, self.plan.interpret)
        group, first = self.table[tile, GROUP] + self.counts[1], self.table[tile, FIRST]

        def move_rows(source: Any, column: Any, slot: Any) -> None:
            target = sliced(to_write.at[slot], width)
            source = source.at[pl.ds(first, width), pl.ds(column, CONTRACTION)]
            plgpu.copy_gmem_to_smem(source, target, self.full.at[slot])

        if self.low is not None:
            slot = self.slot(step)
            plgpu.barrier_wait(self.empty.at[slot])
            move_rows(self.low, 0, slot)
            for _ in range(2):  # in place of the weight's copies
                plgpu.barrier_arrive(self.full.at[slot])
            step = step + 1

        def one(term: _Term, step: Any, k: Any, _: None) -> None:
            slot = self.slot(step + k)
            plgpu.barrier_wait(self.empty.at[slot])
            values, scale = term.weight(self.plan.order, group, block, k)
            plgpu.copy_gmem_to_smem(values, self.values_smem.at[slot], self.full.at[slot])
            plgpu.copy_gmem_to_smem(scale, self.scale_smem.at[slot], self.full.at[slot])
            move_rows(term.x, k * CONTRACTION, slot)

        # Those that compute see one contraction, whichever term a step is of.
        for term in self.terms:
            lax.fori_loop(0, term.steps, partial(one, term, step), None)
            step = step + term.steps

    def compute(self, width: int, tile: Any, block: Any, step: Any) -> None:
        """Multiplies a tile's operands as slots become full, and stores the product."""
        accumulator = Accumulator((WARPGROUP_FEATURES, width), jnp.float32)
        work = self.accumulate_plainly if self.plan.interpret else self.accumulate
        pl.run_scoped(lambda acc: work(acc, width, tile, block, step), accumulator)

    def accumulate_plainly(self, acc: Any, width: int, tile: Any, block: Any, step: Any) -> None:
        """`accumulate` in what the interpreter knows: nothing by lanes, A from shared memory."""
        warpgroup = lax.axis_index("warpgroup")
        operand = self.stage_smem.at[warpgroup]
        mine = warpgroup * WARPGROUP_FEATURES
        start = block * FEATURES + mine
        before = int(self.low is not None)

        def add(slot: Any, weight: Any) -> None:
            operand[...] = weight
            plgpu.commit_smem()
            plgpu.wgmma(acc, operand, sliced(self.x_smem.at[slot], width).T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.empty.at[slot])

        def one(k: Any, _: None) -> None:
            slot = self.slot(step + before + k)
            plgpu.barrier_wait(self.full.at[slot])
            values = self.values_smem[slot].astype(jnp.float32)
            scale = jnp.repeat(self.scale_smem[slot].T, GROUP_SIZE, axis=1)
            decoded = (values * scale.astype(jnp.float32)).astype(jnp.bfloat16)
            by_feature = decoded if self.plan.order is Order.BY_ROW else decoded.T
            features = WARPGROUP_FEATURES
            add(slot, lax.dynamic_slice_in_dim(by_feature, mine, features))

        if self.low is not None:
            slot = self.slot(step)
            group = self.table[tile, GROUP] * int(self.factor.shape[0] > 1)
            plgpu.barrier_wait(self.full.at[slot])
            add(slot, self.factor[group, pl.ds(start, WARPGROUP_FEATURES)])
        lax.fori_loop(0, sum(self.plan.steps), one, None)
        product = acc[...].T.astype(jnp.bfloat16)
        first, rows = self.table[tile, FIRST], self.table[tile, ROWS]
        columns = pl.ds(start, WARPGROUP_FEATURES)

        def store(row: Any, _: None) -> None:
            self.y[pl.ds(first + row, 1), columns] = lax.dynamic_slice_in_dim(product, row, 1)

        lax.fori_loop(0, rows, store, None)

    def accumulate(self, acc: Any, width: int, tile: Any, block: Any, step: Any) -> None:
        """`compute` with its accumulator, [64, width]."""
        plan, table = self.plan, self.table
        steps = sum(plan.steps)
        _, to_read = both_views(self.x_smem, plan.interpret)
        before = int(self.low is not None)

        def decoded(k: Any) -> Any:
            slot = self.slot(step + before + k)
            plgpu.barrier_wait(self.full.at[slot])
            return fragments.decode(plan.order, self.values_smem.at[slot], self.scale_smem.at[slot])

        def start(k: Any, weight: Any) -> None:
            rows = sliced(to_read.at[self.slot(step + before + k)], width)
            plgpu.wgmma(acc, weight, rows.T)

        def finish(k: Any, in_flight: int) -> None:
            plgpu.wgmma_wait(in_flight)
            plgpu.barrier_arrive(self.empty.at[self.slot(step + before + k)])

        # Two steps a turn, so that the registers of one can be filled while the other's are read.
        def two(half: Any, first: bool) -> None:
            k = 2 * half
            start(k, decoded(k))
            if not first:
                finish(k - 1, 1)
            start(k + 1, decoded(k + 1))
            finish(k, 1)

        if self.low is not None:
            # First, while registers are free: last, ptxas would serialise the multiplications.
            group = table[tile, GROUP] * int(self.factor.shape[0] > 1)  # 0: the shared one
            weight = fragments.load_factor(self.factor, group, block)
            plgpu.barrier_wait(self.full.at[self.slot(step)])
            start(-1, weight)
            finish(-1, 0)
        two(jnp.int32(0), True)
        lax.fori_loop(1, steps // 2, lambda half, _: two(half, False), None)
        finish(steps - 1, 0)
        first, rows = table[tile, FIRST], table[tile, ROWS]
        stage, feature = self.stage_smem, block * FEATURES
        fragments.store_rows(plan.order, acc[...], stage, self.y, first, rows, feature)
