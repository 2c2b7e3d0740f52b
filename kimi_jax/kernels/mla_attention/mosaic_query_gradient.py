"""The gradient of the queries of packed attention on Hopper: 128 queries a block, which walks their keys.

Accumulators begin with what would be subtracted afterwards: scores with the logarithm of their
denominator, the gradient of probabilities with their mean. That spares registers and instructions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32, Int

from kimi_jax.kernels.mla_attention import mosaic_common as common
from kimi_jax.kernels.mla_attention.mosaic_common import COMPUTING, LOG2_E, ROWS, TILE, Plan

KEYS, STAGES = 64, 3  # of a step; steps in flight


def query_gradient(
    plan: Plan,
    q_BTNH: BFloat16[Array, "B T N qk"],
    k_BTNH: BFloat16[Array, "B T N qk"],
    v_BTNU: BFloat16[Array, "B T N U"],
    d_out_BTNU: BFloat16[Array, "B T N U"],
    score_start_BNT: Float32[Array, "B N T"],
    mean_start_BNT: Float32[Array, "B N T"],
    first_BT: Int[Array, "B T"],
) -> BFloat16[Array, "B T N qk"]:
    """Gradient of the queries.

    Args:
        plan: see there.
        q_BTNH: queries.
        k_BTNH: keys.
        v_BTNU: values.
        d_out_BTNU: gradient of the output.
        score_start_BNT: minus each query's logarithm of the denominator, divided by the scale.
        mean_start_BNT: minus the sum of output times its gradient.
        first_BT: the first key that each query sees, not decreasing along a row.
    """
    scratch = {
        "q_smem": common.operand_memory(COMPUTING, ROWS, plan.key_width),
        "d_smem": common.operand_memory(COMPUTING, ROWS, plan.value_width),
        "k_smem": common.operand_memory(STAGES, KEYS, plan.key_width),
        "v_smem": common.operand_memory(STAGES, KEYS, plan.value_width),
        "own": common.full_barrier(COMPUTING, copies=2),
        "k_full": common.full_barrier(STAGES),
        "v_full": common.full_barrier(STAGES),
        "k_empty": common.empty_barrier(STAGES),
        "v_empty": common.empty_barrier(STAGES),
        "memory": common.interpreter_memory(plan, KEYS, KEYS, KEYS, plan.key_width),
    }

    def body(*operands: Any, **scratch: Any) -> None:
        _Block(plan, *plan.place(last_first=True), *operands, **scratch).run()

    out_type = jax.ShapeDtypeStruct(q_BTNH.shape, jnp.bfloat16)
    kernel = common.launch(body, plan, out_type, scratch, "packed_attention_query_gradient")
    return kernel(q_BTNH, k_BTNH, v_BTNU, d_out_BTNU, score_start_BNT, mean_start_BNT, first_BT)


@dataclass(frozen=True)
class _Block:
    plan: Plan
    sequence: Any
    head: Any
    tile: Any
    q: Any
    k: Any
    v: Any
    d_out: Any
    score_start: Any
    mean_start: Any
    first: Any
    dq: Any
    q_smem: Any
    d_smem: Any
    k_smem: Any
    v_smem: Any
    own: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    memory: Any

    def run(self) -> None:
        begin = lax.div(self.first[self.sequence, self.tile * TILE], jnp.int32(KEYS))
        end = (self.tile + 1) * (TILE // KEYS)
        common.specialise(
            (self.k_empty, self.v_empty),
            STAGES,
            lambda: self.move(begin, end),
            lambda warpgroup: self.compute(warpgroup, begin, end),
        )

    def move(self, begin: Any, end: Any) -> None:
        """Copies tiles of keys and values as they are used up."""

        def copy(step: Any, _: None) -> None:
            slot = lax.rem(step - begin, jnp.int32(STAGES))
            for source, target, empty, full in (
                (self.k, self.k_smem, self.k_empty, self.k_full),
                (self.v, self.v_smem, self.v_empty, self.v_full),
            ):
                plgpu.barrier_wait(empty.at[slot])
                source = source.at[self.sequence, pl.ds(step * KEYS, KEYS), self.head]
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        lax.fori_loop(begin, end, copy, None)

    def compute(self, warpgroup: Any, begin: Any, end: Any) -> None:
        """64 queries."""
        base = self.tile * TILE + warpgroup * ROWS
        rows = pl.ds(base, ROWS)
        own = self.own.at[warpgroup]
        for source, target in ((self.q, self.q_smem), (self.d_out, self.d_smem)):
            source = source.at[self.sequence, rows, self.head]
            plgpu.copy_gmem_to_smem(source, target.at[warpgroup], own)
        first = common.load_rows(self.first, (self.sequence, rows))
        places = self.sequence, self.head, rows
        score_start = common.load_rows(self.score_start, places)
        mean_start = common.load_rows(self.mean_start, places)
        # From here to the diagonal, every query sees every key.
        last_first = self.first[self.sequence, base + (ROWS - 1)]
        clear = lax.div(last_first + (KEYS - 1), jnp.int32(KEYS))
        diagonal = lax.div(base, jnp.int32(KEYS))
        plgpu.barrier_wait(own)

        def accumulate(scores: Any, products: Any, dq: Any) -> Any:
            dq[...] = common.zeros(self.plan.key_width)
            starts = score_start, mean_start
            work = _Rows(self, warpgroup, base, first, begin, starts, scores, products, dq)
            work.step(begin, masked=True, follows=False)
            turning = jnp.maximum(jnp.minimum(clear, diagonal), begin + 1)
            last = jnp.maximum(diagonal, begin + 1)
            for start, stop, masked in (
                (begin + 1, turning, True),
                (turning, last, False),
                (last, end, True),
            ):
                lax.fori_loop(
                    start, stop, lambda step, _, masked=masked: work.step(step, masked), None
                )
            total = common.read(self.plan, dq, 0)
            work.release(self.k_empty, end - 1)
            return total

        widths = KEYS, KEYS, self.plan.key_width
        total = common.with_accumulators(self.memory, accumulate, *widths)
        stage = self.q_smem.at[warpgroup]  # the queries' place is free now
        stage[...] = (total * self.plan.scale).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, self.dq.at[self.sequence, rows, self.head])
        plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True)
class _Rows:
    """One warpgroup's work; `scores`, `products` and `dq` are accumulators."""

    block: _Block
    warpgroup: Any
    base: Any
    first: Any
    begin: Any
    starts: tuple[Any, Any]
    scores: Any
    products: Any
    dq: Any

    def release(self, barrier: Any, step: Any) -> None:
        plgpu.barrier_arrive(barrier.at[lax.rem(step - self.begin, jnp.int32(STAGES))])

    def step(self, step: Any, masked: bool, follows: bool = True) -> None:
        """A tile of keys. Its last product is in flight until the next step needs the tensor cores."""
        block, plan, warpgroup = self.block, self.block.plan, self.warpgroup
        slot = lax.rem(step - self.begin, jnp.int32(STAGES))
        keys, values = block.k_smem.at[slot], block.v_smem.at[slot]
        plgpu.barrier_wait(block.k_full.at[slot])
        self.scores[...] = common.spread(self.starts[0], KEYS)
        common.multiply(self.scores, block.q_smem.at[warpgroup], keys.T, block.memory)
        plgpu.barrier_wait(block.v_full.at[slot])
        self.products[...] = common.spread(self.starts[1], KEYS)
        common.multiply(self.products, block.d_smem.at[warpgroup], values.T, block.memory)
        scores = common.read(plan, self.scores, 1)
        if follows:
            self.release(block.k_empty, step - 1)
        p = jnp.exp2(scores * (plan.scale * LOG2_E))
        if masked:
            query = common.numbers(KEYS, 0, self.base)
            key = common.numbers(KEYS, 1, step * KEYS)
            seen = (key <= query) & (key >= common.spread(self.first, KEYS))
            p = jnp.where(seen, p, 0.0)
        products = common.read(plan, self.products, 0)
        self.release(block.v_empty, step)
        common.multiply(self.dq, (p * products).astype(jnp.bfloat16), keys, block.memory)
