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
    kv_BTNH: BFloat16[Array, "B T N kv"],
    rope_key_BTR: BFloat16[Array, "B T R"],
    d_out_BTNU: BFloat16[Array, "B T N U"],
    score_start_BNT: Float32[Array, "B N T"],
    mean_start_BNT: Float32[Array, "B N T"],
    first_BT: Int[Array, "B T"],
) -> BFloat16[Array, "B T N qk"]:
    """Gradient of the queries.

    Args:
        plan: see there.
        q_BTNH: queries.
        kv_BTNH: keys without position and values, side by side.
        rope_key_BTR: the rotated part of the keys, one for all heads.
        d_out_BTNU: gradient of the output.
        score_start_BNT: minus each query's logarithm of the denominator, divided by the scale.
        mean_start_BNT: minus the sum of output times its gradient.
        first_BT: the first key that each query sees, not decreasing along a row.
    """
    scratch = {
        "q_smem": common.operand_memory(COMPUTING, ROWS, plan.key_width),
        "d_smem": common.operand_memory(COMPUTING, ROWS, plan.value_width),
        "nope_smem": common.operand_memory(STAGES, KEYS, plan.nope_width),
        "rope_smem": common.operand_memory(STAGES, KEYS, plan.rope_width),
        "v_smem": common.operand_memory(STAGES, KEYS, plan.value_width),
        "own": common.full_barrier(COMPUTING, copies=2),
        "k_full": common.full_barrier(STAGES, copies=2),
        "v_full": common.full_barrier(STAGES),
        "k_empty": common.empty_barrier(STAGES),
        "v_empty": common.empty_barrier(STAGES),
        "memory": common.interpreter_memory(
            plan, KEYS, KEYS, KEYS, plan.nope_width, plan.rope_width
        ),
    }

    def body(*operands: Any, **scratch: Any) -> None:
        _Block(plan, *plan.place(last_first=True), *operands, **scratch).run()

    out_type = jax.ShapeDtypeStruct(q_BTNH.shape, jnp.bfloat16)
    kernel = common.launch(
        body, plan, out_type, scratch, "packed_attention_query_gradient", products=3
    )
    starts = score_start_BNT, mean_start_BNT
    return kernel(q_BTNH, kv_BTNH, rope_key_BTR, d_out_BTNU, *starts, first_BT)


@dataclass(frozen=True)
class _Block:
    plan: Plan
    sequence: Any
    head: Any
    tile: Any
    q: Any
    kv: Any
    rope_key: Any
    d_out: Any
    score_start: Any
    mean_start: Any
    first: Any
    dq: Any
    q_smem: Any
    d_smem: Any
    nope_smem: Any
    rope_smem: Any
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
        """Copies both warpgroups' queries, and tiles of keys and values as they are used up."""
        for warpgroup in range(COMPUTING):
            rows = pl.ds(self.tile * TILE + warpgroup * ROWS, ROWS)
            for source, target in ((self.q, self.q_smem), (self.d_out, self.d_smem)):
                source = source.at[self.sequence, rows, self.head]
                plgpu.copy_gmem_to_smem(source, target.at[warpgroup], self.own.at[warpgroup])
        common.move_keys(self, begin, end, KEYS, STAGES)

    def compute(self, warpgroup: Any, begin: Any, end: Any) -> None:
        """64 queries."""
        plan = self.plan
        base = self.tile * TILE + warpgroup * ROWS
        rows = pl.ds(base, ROWS)
        first = common.load_rows(self.first, (self.sequence, rows))
        places = self.sequence, self.head, rows
        score_start = common.load_rows(self.score_start, places)
        mean_start = common.load_rows(self.mean_start, places)
        # From here to the diagonal, every query sees every key.
        last_first = self.first[self.sequence, base + (ROWS - 1)]
        clear = lax.div(last_first + (KEYS - 1), jnp.int32(KEYS))
        diagonal = lax.div(base, jnp.int32(KEYS))
        plgpu.barrier_wait(self.own.at[warpgroup])

        def accumulate(scores: Any, products: Any, d_nope: Any, d_rope: Any) -> Any:
            d_nope[...] = common.zeros(plan.nope_width)
            d_rope[...] = common.zeros(plan.rope_width)
            starts, sums = (score_start, mean_start), (scores, products, d_nope, d_rope)
            work = _Rows(self, warpgroup, base, first, begin, starts, *sums)
            turning = jnp.minimum(clear, diagonal)
            for start, stop, masked in (
                (begin, turning, True),
                (turning, diagonal, False),
                (diagonal, end, True),
            ):
                lax.fori_loop(
                    start, stop, lambda step, _, masked=masked: work.step(step, masked), None
                )
            return common.read(plan, d_nope, 0), common.read(plan, d_rope, 0)

        widths = KEYS, KEYS, plan.nope_width, plan.rope_width
        d_nope, d_rope = common.with_accumulators(self.memory, accumulate, *widths)
        stage = self.q_smem.at[warpgroup]  # the queries' place is free now
        stage[:, plan.nope] = (d_nope * plan.scale).astype(jnp.bfloat16)
        stage[:, plan.rope] = (d_rope * plan.scale).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, self.dq.at[self.sequence, rows, self.head])
        plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True)
class _Rows:
    """One warpgroup's work; the last four are accumulators, of which two are the parts of dq."""

    block: _Block
    warpgroup: Any
    base: Any
    first: Any
    begin: Any
    starts: tuple[Any, Any]
    scores: Any
    products: Any
    d_nope: Any
    d_rope: Any

    def step(self, step: Any, masked: bool) -> None:
        """A tile of keys. The other warpgroup has the tensor cores while this one exponentiates."""
        block, plan, memory = self.block, self.block.plan, self.block.memory
        slot = lax.rem(step - self.begin, jnp.int32(STAGES))
        queries, d_out = block.q_smem.at[self.warpgroup], block.d_smem.at[self.warpgroup]
        nope, rope = block.nope_smem.at[slot], block.rope_smem.at[slot]
        plgpu.barrier_wait(block.k_full.at[slot])
        self.scores[...] = common.spread(self.starts[0], KEYS)
        common.multiply(self.scores, queries.at[:, plan.nope], nope.T, memory)
        common.multiply(self.scores, queries.at[:, plan.rope], rope.T, memory)
        plgpu.barrier_wait(block.v_full.at[slot])
        self.products[...] = common.spread(self.starts[1], KEYS)
        common.multiply(self.products, d_out, block.v_smem.at[slot].T, memory)
        p = jnp.exp2(common.read(plan, self.scores, 1) * (plan.scale * LOG2_E))
        if masked:
            query = common.numbers(KEYS, 0, self.base)
            key = common.numbers(KEYS, 1, step * KEYS)
            seen = (key <= query) & (key >= common.spread(self.first, KEYS))
            p = jnp.where(seen, p, 0.0)
        d_scores = (p * common.read(plan, self.products, 0)).astype(jnp.bfloat16)
        plgpu.barrier_arrive(block.v_empty.at[slot])
        common.multiply(self.d_nope, d_scores, nope, memory)
        common.multiply(self.d_rope, d_scores, rope, memory)
        # Two sums in flight beyond a step: the compiler finds no registers, and makes WGMMA serial.
        common.wait(plan, 0)
        plgpu.barrier_arrive(block.k_empty.at[slot])
