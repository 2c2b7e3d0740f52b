"""The gradients of keys and values of packed attention on Hopper: 128 keys a block, which walks the
queries that see them. Scores are transposed here, so that probabilities, once made, are an operand
of WGMMA in the registers where they are. See `mosaic_query_gradient` for how accumulators begin.
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

QUERIES, STAGES = 32, 4  # of a step; steps in flight
GROUP = 32  # of the operands' memory, because 32 queries are contracted


def key_gradient(
    plan: Plan,
    q_BTNH: BFloat16[Array, "B T N qk"],
    kv_BTNH: BFloat16[Array, "B T N kv"],
    rope_key_BTR: BFloat16[Array, "B T R"],
    d_out_BTNU: BFloat16[Array, "B T N U"],
    score_start_BNT: Float32[Array, "B N T"],
    mean_start_BNT: Float32[Array, "B N T"],
    last_BT: Int[Array, "B T"],
) -> tuple[BFloat16[Array, "B T N kv"], BFloat16[Array, "B N T R"]]:
    """Gradients of keys and values, and each head's gradient of the shared key.

    `last_BT` is the last query that sees each key, not decreasing along a row; see
    `mosaic_query_gradient.query_gradient` for the others.
    """
    scratch = {
        "nope_smem": common.operand_memory(COMPUTING, ROWS, plan.nope_width, group=GROUP),
        "rope_smem": common.operand_memory(COMPUTING, ROWS, plan.rope_width, group=GROUP),
        "v_smem": common.operand_memory(COMPUTING, ROWS, plan.value_width, group=GROUP),
        "q_smem": common.operand_memory(STAGES, QUERIES, plan.key_width, group=GROUP),
        "d_smem": common.operand_memory(STAGES, QUERIES, plan.value_width, group=GROUP),
        "score_smem": plgpu.SMEM((STAGES, QUERIES), jnp.float32),
        "mean_smem": plgpu.SMEM((STAGES, QUERIES), jnp.float32),
        "own": common.full_barrier(COMPUTING, copies=3),
        "full": common.full_barrier(STAGES, copies=4),
        "empty": common.empty_barrier(STAGES),
        "memory": common.interpreter_memory(
            plan, QUERIES, QUERIES, QUERIES, plan.key_width, plan.value_width, group=GROUP
        ),
    }

    def body(*operands: Any, **scratch: Any) -> None:
        _Block(plan, *plan.place(last_first=False), *operands, **scratch).run()

    rope_shape = plan.batch, plan.heads, plan.length, plan.rope_width
    out_type = tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (kv_BTNH.shape, rope_shape)
    )
    kernel = common.launch(
        body, plan, out_type, scratch, "packed_attention_key_gradient", products=4
    )
    starts = score_start_BNT, mean_start_BNT
    return kernel(q_BTNH, kv_BTNH, rope_key_BTR, d_out_BTNU, *starts, last_BT)


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
    last: Any
    d_kv: Any
    d_rope: Any
    nope_smem: Any
    rope_smem: Any
    v_smem: Any
    q_smem: Any
    d_smem: Any
    score_smem: Any
    mean_smem: Any
    own: Any
    full: Any
    empty: Any
    memory: Any

    def run(self) -> None:
        first_key = self.tile * TILE
        begin = self.tile * (TILE // QUERIES)
        last = self.last[self.sequence, first_key + (TILE - 1)]
        end = lax.div(last, jnp.int32(QUERIES)) + 1
        # Between the diagonal and here, every query sees every key.
        clear = lax.div(self.last[self.sequence, first_key] + 1, jnp.int32(QUERIES))
        common.specialise(
            (self.empty,),
            STAGES,
            lambda: self.move(begin, end),
            lambda warpgroup: self.compute(warpgroup, begin, clear, end),
        )

    def move(self, begin: Any, end: Any) -> None:
        """Copies both warpgroups' keys and values, and tiles of queries as they are used up."""
        plan = self.plan
        for warpgroup in range(COMPUTING):
            rows = pl.ds(self.tile * TILE + warpgroup * ROWS, ROWS)
            kv = self.kv.at[self.sequence, rows, self.head]
            for source, target in (
                (kv.at[:, plan.nope], self.nope_smem),
                (self.rope_key.at[self.sequence, rows], self.rope_smem),
                (kv.at[:, plan.value], self.v_smem),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[warpgroup], self.own.at[warpgroup])

        def copy(step: Any, _: None) -> None:
            slot = lax.rem(step - begin, jnp.int32(STAGES))
            plgpu.barrier_wait(self.empty.at[slot])
            rows = pl.ds(step * QUERIES, QUERIES)
            for source, target in (
                (self.q.at[self.sequence, rows, self.head], self.q_smem),
                (self.d_out.at[self.sequence, rows, self.head], self.d_smem),
                (self.score_start.at[self.sequence, self.head, rows], self.score_smem),
                (self.mean_start.at[self.sequence, self.head, rows], self.mean_smem),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], self.full.at[slot])

        lax.fori_loop(begin, end, copy, None)

    def compute(self, warpgroup: Any, begin: Any, clear: Any, end: Any) -> None:
        """64 keys and their values."""
        base = self.tile * TILE + warpgroup * ROWS
        rows = pl.ds(base, ROWS)
        own = self.own.at[warpgroup]
        plan = self.plan
        last = common.load_rows(self.last, (self.sequence, rows))
        plgpu.barrier_wait(own)

        def accumulate(scores: Any, products: Any, dk: Any, dv: Any) -> tuple[Any, Any]:
            dk[...] = common.zeros(self.plan.key_width)
            dv[...] = common.zeros(self.plan.value_width)
            work = _Rows(self, warpgroup, base, last, begin, scores, products, dk, dv)
            crossing = begin + TILE // QUERIES  # the first tile beyond the diagonal
            turning = jnp.maximum(clear, crossing)
            for start, stop, masked in (
                (begin, crossing, True),
                (crossing, turning, False),
                (turning, end, True),
            ):
                lax.fori_loop(
                    start, stop, lambda step, _, masked=masked: work.step(step, masked), None
                )
            return common.read(self.plan, dk, 0), common.read(self.plan, dv, 0)

        widths = QUERIES, QUERIES, self.plan.key_width, self.plan.value_width
        dk, dv = common.with_accumulators(self.memory, accumulate, *widths)
        # The keys' and values' places are free now.
        nope, rope, values = (
            memory.at[warpgroup] for memory in (self.nope_smem, self.rope_smem, self.v_smem)
        )
        dk = (dk * plan.scale).astype(jnp.bfloat16)
        nope[...] = dk[:, : plan.nope_width]
        rope[...] = dk[:, plan.nope_width :]
        values[...] = dv.astype(jnp.bfloat16)
        plgpu.commit_smem()
        d_kv = self.d_kv.at[self.sequence, rows, self.head]
        plgpu.copy_smem_to_gmem(nope, d_kv.at[:, plan.nope])
        plgpu.copy_smem_to_gmem(values, d_kv.at[:, plan.value])
        plgpu.copy_smem_to_gmem(rope, self.d_rope.at[self.sequence, self.head, rows])
        plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True)
class _Rows:
    """One warpgroup's work; the last four are accumulators."""

    block: _Block
    warpgroup: Any
    base: Any
    last: Any
    begin: Any
    scores: Any
    products: Any
    dk: Any
    dv: Any

    def step(self, step: Any, masked: bool) -> None:
        """A tile of queries. The other warpgroup has the tensor cores while this one exponentiates."""
        block, plan, memory = self.block, self.block.plan, self.block.memory
        slot = lax.rem(step - self.begin, jnp.int32(STAGES))
        queries, d_out = block.q_smem.at[slot], block.d_smem.at[slot]
        plgpu.barrier_wait(block.full.at[slot])
        start = plgpu.load(block.score_smem.at[slot], layout=common.BY_COLUMN)
        self.scores[...] = common.spread(start, QUERIES, 1)
        for columns, keys in ((plan.nope, block.nope_smem), (plan.rope, block.rope_smem)):
            part = block.q_smem.at[slot, :, columns]
            common.multiply(self.scores, keys.at[self.warpgroup], part.T, memory)
        p = jnp.exp2(common.read(plan, self.scores, 0) * (plan.scale * LOG2_E))
        if masked:
            key = common.numbers(QUERIES, 0, self.base)
            query = common.numbers(QUERIES, 1, step * QUERIES)
            seen = (query >= key) & (query <= common.spread(self.last, QUERIES))
            p = jnp.where(seen, p, 0.0)
        # From here on in bf16: in fp32 they would not leave registers enough for the rest.
        p = p.astype(jnp.bfloat16)
        start = plgpu.load(block.mean_smem.at[slot], layout=common.BY_COLUMN)
        self.products[...] = common.spread(start, QUERIES, 1)
        common.multiply(self.products, block.v_smem.at[self.warpgroup], d_out.T, memory)
        common.multiply(self.dv, p, d_out, memory)
        d_scores = p.astype(jnp.float32) * common.read(plan, self.products, 1)
        common.multiply(self.dk, d_scores.astype(jnp.bfloat16), queries, memory)
        common.wait(plan, 0)
        plgpu.barrier_arrive(block.empty.at[slot])
