"""Packed causal attention on Hopper, forward: a block has 128 queries of a head and walks its keys.

While the tensor cores multiply a tile's probabilities by values, the next tile's scores are made and
exponentiated (as in FlashAttention-3, arXiv:2407.08608).
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

KEYS, STAGES = 128, 2  # of a step; steps in flight


def forward(
    plan: Plan,
    q_BTNH: BFloat16[Array, "B T N qk"],
    kv_BTNH: BFloat16[Array, "B T N kv"],
    rope_key_BTR: BFloat16[Array, "B T R"],
    first_BT: Int[Array, "B T"],
) -> tuple[BFloat16[Array, "B T N U"], Float32[Array, "B N T"]]:
    """Output, and the logarithms of the softmax's denominators.

    `first_BT` is the first key that each query sees; it must not decrease along a row.
    """
    out_shape = plan.batch, plan.length, plan.heads, plan.value_width
    out_type = (
        jax.ShapeDtypeStruct(out_shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.length), jnp.float32),
    )
    scratch = {
        "q_smem": common.reused_memory(plan.key_width, plan.value_width, plan.interpret),
        "nope_smem": common.operand_memory(STAGES, KEYS, plan.nope_width),
        "rope_smem": common.operand_memory(STAGES, KEYS, plan.rope_width),
        "v_smem": common.operand_memory(STAGES, KEYS, plan.value_width),
        "log_smem": plgpu.SMEM((COMPUTING, ROWS), jnp.float32),
        "q_full": common.full_barrier(COMPUTING),
        "k_full": common.full_barrier(STAGES, copies=2),
        "v_full": common.full_barrier(STAGES),
        "k_empty": common.empty_barrier(STAGES),
        "v_empty": common.empty_barrier(STAGES),
        "memory": common.interpreter_memory(plan, KEYS, KEYS, plan.value_width),
    }
    if plan.interpret:
        scratch["out_smem"] = common.operand_memory(COMPUTING, ROWS, plan.value_width)

    def body(*operands: Any, q_smem: Any, out_smem: Any = None, **scratch: Any) -> None:
        q_smem, out_smem = (q_smem, out_smem) if plan.interpret else q_smem
        places = plan.place(last_first=True)
        _Block(plan, *places, *operands, q_smem=q_smem, out_smem=out_smem, **scratch).run()

    kernel = common.launch(body, plan, out_type, scratch, "packed_attention_forward", products=2)
    return kernel(q_BTNH, kv_BTNH, rope_key_BTR, first_BT)


@dataclass(frozen=True)
class _Block:
    plan: Plan
    sequence: Any
    head: Any
    tile: Any
    q: Any
    kv: Any
    rope_key: Any
    first: Any
    out: Any
    logsumexp: Any
    q_smem: Any
    out_smem: Any
    nope_smem: Any
    rope_smem: Any
    v_smem: Any
    log_smem: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    memory: Any

    def run(self) -> None:
        begin = lax.div(self.first[self.sequence, self.tile * TILE], jnp.int32(KEYS))
        end = lax.div(self.tile * TILE + (TILE - 1), jnp.int32(KEYS)) + 1
        common.specialise(
            (self.k_empty, self.v_empty),
            STAGES,
            lambda: common.move_keys(self, begin, end, KEYS, STAGES),
            lambda warpgroup: self.compute(warpgroup, begin, end),
        )

    def compute(self, warpgroup: Any, begin: Any, end: Any) -> None:
        """64 queries: output and logarithms."""
        base = self.tile * TILE + warpgroup * ROWS
        rows = pl.ds(base, ROWS)
        source = self.q.at[self.sequence, rows, self.head]
        plgpu.copy_gmem_to_smem(source, self.q_smem.at[warpgroup], self.q_full.at[warpgroup])
        first = common.load_rows(self.first, (self.sequence, rows))
        last_first = self.first[self.sequence, base + (ROWS - 1)]
        # From here to the diagonal, every query sees every key.
        clear = lax.div(last_first + (KEYS - 1), jnp.int32(KEYS))
        plgpu.barrier_wait(self.q_full.at[warpgroup])

        def accumulate(scores: Any, out: Any) -> tuple[Any, Any, Any]:
            work = _Rows(self.plan, self, warpgroup, base, first, begin, scores, out)
            out[...] = common.zeros(self.plan.value_width)
            carry = work.start()
            turning = jnp.maximum(jnp.minimum(clear, end - 1), begin + 1)
            last = jnp.maximum(end - 1, begin + 1)
            carry = lax.fori_loop(begin + 1, turning, work.masked, carry)
            carry = lax.fori_loop(turning, last, work.clear, carry)
            carry = lax.fori_loop(last, end, work.masked, carry)
            work.finish(end - 1, carry)
            return common.read(self.plan, out, 0), *carry[:2]

        total, largest, denominator = common.with_accumulators(
            self.memory, accumulate, KEYS, self.plan.value_width
        )
        out = total / common.spread(denominator, self.plan.value_width)
        # The queries' place is free now.
        stage = self.out_smem.at[warpgroup, pl.ds(0, ROWS)]
        stage[...] = out.astype(jnp.bfloat16)
        self.log_smem[warpgroup] = largest / LOG2_E + jnp.log(denominator)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, self.out.at[self.sequence, rows, self.head])
        target = self.logsumexp.at[self.sequence, self.head, rows]
        plgpu.copy_smem_to_gmem(self.log_smem.at[warpgroup], target)
        plgpu.wait_smem_to_gmem(0)


_Carry = tuple[Any, Any, Any]  # largest score (in powers of 2), denominator, probabilities in bf16


@dataclass(frozen=True)
class _Rows:
    """One warpgroup's online softmax; `scores` and `out` are accumulators."""

    plan: Plan
    block: _Block
    warpgroup: Any
    base: Any
    first: Any
    begin: Any
    scores: Any
    out: Any

    def start(self) -> _Carry:
        """The first tile of keys."""
        self.multiply_keys(self.begin)
        scores = common.read(self.plan, self.scores, 0)
        self.release(self.block.k_empty, self.begin)
        start = jnp.full((ROWS,), common.LOWEST, jnp.float32)
        largest = plgpu.layout_cast(start, common.BY_ROW)
        empty = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), common.BY_ROW)
        largest, _, denominator, p = self.softmax(self.masking(scores, self.begin), largest, empty)
        return largest, denominator, p.astype(jnp.bfloat16)

    def masked(self, step: Any, carry: _Carry) -> _Carry:
        """A tile of keys that not every query sees."""
        return self.step(step, carry, True)

    def clear(self, step: Any, carry: _Carry) -> _Carry:
        """A tile of keys that every query sees."""
        return self.step(step, carry, False)

    def step(self, step: Any, carry: _Carry, masked: bool) -> _Carry:
        """Scores of this tile of keys, while the tile before meets its values."""
        largest, denominator, p = carry
        self.multiply_keys(step)
        self.multiply_values(step - 1, p)
        scores = common.read(self.plan, self.scores, 1)
        self.release(self.block.k_empty, step)
        if masked:
            scores = self.masking(scores, step)
        largest, shrink, denominator, p = self.softmax(scores, largest, denominator)
        total = common.read(self.plan, self.out, 0)
        self.release(self.block.v_empty, step - 1)
        self.out[...] = total * common.spread(shrink, self.plan.value_width)
        return largest, denominator, p.astype(jnp.bfloat16)

    def finish(self, step: Any, carry: _Carry) -> None:
        """The last tile meets its values."""
        self.multiply_values(step, carry[2])
        common.wait(self.plan, 0)
        self.release(self.block.v_empty, step)

    def slot(self, step: Any) -> Any:
        return lax.rem(step - self.begin, jnp.int32(STAGES))

    def release(self, barrier: Any, step: Any) -> None:
        plgpu.barrier_arrive(barrier.at[self.slot(step)])

    def multiply_keys(self, step: Any) -> None:
        slot = self.slot(step)
        plgpu.barrier_wait(self.block.k_full.at[slot])
        self.scores[...] = common.zeros(KEYS)
        plan, queries = self.plan, self.block.q_smem.at[self.warpgroup]
        for columns, keys in ((plan.nope, self.block.nope_smem), (plan.rope, self.block.rope_smem)):
            part = queries.at[:, columns]
            common.multiply(self.scores, part, keys.at[slot].T, self.block.memory)

    def multiply_values(self, step: Any, p: Any) -> None:
        slot = self.slot(step)
        plgpu.barrier_wait(self.block.v_full.at[slot])
        common.multiply(self.out, p, self.block.v_smem.at[slot], self.block.memory)

    def masking(self, scores: Any, step: Any) -> Any:
        query = common.numbers(KEYS, 0, self.base)
        key = common.numbers(KEYS, 1, step * KEYS)
        seen = (key <= query) & (key >= common.spread(self.first, KEYS))
        return jnp.where(seen, scores, common.MASKED)

    def softmax(self, scores: Any, largest: Any, denominator: Any) -> tuple[Any, Any, Any, Any]:
        """The largest score so far, what earlier sums shrink by, the denominator, this tile's terms."""
        factor = self.plan.scale * LOG2_E
        now = jnp.maximum(largest, scores.max(axis=1) * factor)
        p = jnp.exp2(scores * factor - common.spread(now, KEYS))
        shrink = jnp.exp2(largest - now)
        return now, shrink, denominator * shrink + p.sum(axis=1), p
