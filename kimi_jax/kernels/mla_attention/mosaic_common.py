"""What the passes of packed attention on Hopper share: who works on what, and shared memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kimi_jax.kernels.latency import expected

COMPUTING = 2  # warpgroups
ROWS = 64  # of a warpgroup, as WGMMA has them
TILE = COMPUTING * ROWS  # rows of a block
HEADS_TOGETHER = 4  # whose keys and values are in the L2 cache at a time
LOG2_E = 1.4426950408889634
# A row may have nothing to see in a tile: the largest of its scores, in powers of 2, is then the
# lowest, and the exponential of a masked score minus that is 0, not NaN.
MASKED, LOWEST = -1e30, -1e6
MEMORY_REGISTERS, COMPUTE_REGISTERS = 24, 240  # together what three warpgroups are launched with

Accumulator: Any = plgpu.WGMMAAccumulatorRef
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Plan:
    """What a kernel's code is specialised for.

    batch, length, heads: of rows [B, T, N, width]. nope_width, value_width: of a head's keys without
    position and of its values, which stand side by side. rope_width: of the key that all heads share.
    scale: of the scores. interpret: run on the CPU.
    """

    batch: int
    length: int
    heads: int
    nope_width: int
    rope_width: int
    value_width: int
    scale: float
    interpret: bool

    @property
    def key_width(self) -> int:
        """Of a head's queries."""
        return self.nope_width + self.rope_width

    @property
    def nope(self) -> Any:
        """Columns of queries, and of keys and values, that belong to keys without position."""
        return pl.ds(0, self.nope_width)

    @property
    def rope(self) -> Any:
        """Columns of queries that meet the shared key."""
        return pl.ds(self.nope_width, self.rope_width)

    @property
    def value(self) -> Any:
        """Columns of keys and values that belong to values."""
        return pl.ds(self.nope_width, self.value_width)

    @property
    def tiles(self) -> int:
        """Blocks along a row of tokens."""
        return self.length // TILE

    @property
    def grid(self) -> int:
        """Blocks altogether."""
        return self.batch * self.heads * self.tiles

    def place(self, last_first: bool) -> tuple[Any, Any, Any]:
        """This block's sequence, head and tile: some heads at a time, the longest work of them first.

        Args:
            last_first: whether later tiles have more to do.
        """
        together = HEADS_TOGETHER if self.heads % HEADS_TOGETHER == 0 else 1
        rest, head = _divide(lax.axis_index("block"), together)
        rest, tile = _divide(rest, self.tiles)
        sequence, group = _divide(rest, self.heads // together)
        return (
            sequence,
            group * together + head,
            (self.tiles - 1 - tile) if last_first else tile,
        )


def _divide(number: Any, by: int) -> tuple[Any, Any]:
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def operand_memory(*shape: int, group: int = 64) -> Any:
    """Shared memory for bf16 operands of WGMMA.

    Their last dimension, and what is contracted, are multiples of `group`: 64, or 32, which both
    operands of a product have to be in.
    """
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiling((8, group)), swizzle(2 * group)))


def reused_memory(width: int, width_out: int, interpret: bool) -> Any:
    """A warpgroup's 64 rows of an operand, and in the same bytes those of what it puts out.

    The output has more rows than are used, so that both warpgroups' begin at the same places. The
    interpreter, which knows no unions, gets the operand alone.
    """
    assert ROWS * width % width_out == 0
    assert width >= width_out
    operand = operand_memory(COMPUTING, ROWS, width)
    out = operand_memory(COMPUTING, ROWS * width // width_out, width_out)
    return operand if interpret else plgpu.RefUnion(operand, out)


def full_barrier(stages: int, copies: int = 1) -> Any:
    """Stages that copies fill."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=stages)


def empty_barrier(stages: int) -> Any:
    """Stages that all computing warpgroups release."""
    return plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)


def specialise(
    empties: tuple[Any, ...], stages: int, move: Callable[[], None], compute: Callable[[Any], None]
) -> None:
    """The last warpgroup moves, the others compute; `compute` gets their number.

    `empties` are the barriers by which those that compute release the stages of a pipeline. All are
    empty at first, and at last, so that no barrier is left in the middle of a phase.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        move()
        for empty in empties:
            for slot in range(stages):
                plgpu.barrier_wait(empty.at[slot])

    @pl.when(warpgroup < COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for empty in empties:
            for slot in range(stages):
                plgpu.barrier_arrive(empty.at[slot])
        compute(warpgroup)


def move_keys(block: Any, begin: Any, end: Any, keys: int, stages: int) -> None:
    """Copies a head's keys and values to shared memory as they are used up, so many keys a step.

    `block` has both arrays, their places in shared memory, and the barriers of keys and of values.
    """
    plan = block.plan

    def copy(step: Any, _: None) -> None:
        slot = lax.rem(step - begin, jnp.int32(stages))
        rows = pl.ds(step * keys, keys)
        kv = block.kv.at[block.sequence, rows, block.head]
        plgpu.barrier_wait(block.k_empty.at[slot])
        for source, target in (
            (kv.at[:, plan.nope], block.nope_smem),
            (block.rope_key.at[block.sequence, rows], block.rope_smem),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[slot], block.k_full.at[slot])
        plgpu.barrier_wait(block.v_empty.at[slot])
        values = kv.at[:, plan.value]
        plgpu.copy_gmem_to_smem(values, block.v_smem.at[slot], block.v_full.at[slot])

    lax.fori_loop(begin, end, copy, None)


def spread(vector: Any, columns: int, dimension: int = 0) -> Any:
    """A vector along rows (0) or columns (1) of a tile of 64 × columns."""
    return lax.broadcast_in_dim(vector, (ROWS, columns), [dimension])


def numbers(columns: int, dimension: int, first: Any) -> Any:
    """first, first + 1, … along rows (0) or columns (1) of a tile."""
    shape = (ROWS, columns)
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA) + first


def zeros(columns: int) -> Any:
    """A tile of fp32 zeros in an accumulator's layout."""
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def load_rows(ref: Any, index: tuple[Any, ...]) -> Any:
    """One number for each row of a tile, from global memory."""
    return plgpu.load(ref, index, layout=BY_ROW, optimized=False)


def interpreter_memory(plan: Plan, operand: int, *widths: int, group: int = 64) -> tuple[Any, ...]:
    """What the interpreter has in place of registers: a bf16 operand of 64 rows, and accumulators."""
    if not plan.interpret:
        return ()
    shapes = [(COMPUTING, ROWS, width) for width in widths]
    return (
        operand_memory(COMPUTING, ROWS, operand, group=group),
        *(plgpu.SMEM(shape, jnp.float32) for shape in shapes),
    )


def with_accumulators(memory: Any, work: Callable[..., Any], *widths: int) -> Any:
    """Calls work with an fp32 accumulator of 64 rows for each width."""
    if memory:
        return work(*(ref.at[lax.axis_index("warpgroup")] for ref in memory[1:]))
    return pl.run_scoped(work, *(Accumulator((ROWS, width), jnp.float32) for width in widths))


def multiply(accumulator: Any, a: Any, b: Any, memory: Any) -> None:
    """accumulator += a · b, in flight until `wait` or `read` says otherwise.

    The interpreter's WGMMA takes no operand from registers, and its accumulators cannot be written.
    """
    if not memory:
        plgpu.wgmma(accumulator, a, b)
        return
    if isinstance(a, jax.Array):
        stage = memory[0].at[lax.axis_index("warpgroup")]
        stage[...] = a
        plgpu.commit_smem()
        a = stage

    def product(fresh: Any) -> Any:
        plgpu.wgmma(fresh, a, b)
        return fresh[...]

    fresh = Accumulator(tuple(accumulator.shape), jnp.float32)
    accumulator[...] = accumulator[...] + pl.run_scoped(product, fresh)


def wait(plan: Plan, in_flight: int) -> None:
    """Until at most so many of the latest products are unfinished."""
    if not plan.interpret:
        plgpu.wgmma_wait(in_flight)


def read(plan: Plan, accumulator: Any, in_flight: int) -> Any:
    """An accumulator, when at most so many of the latest products are unfinished."""
    if plan.interpret:
        return accumulator[...]
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)


def launch(
    body: Callable[..., None], plan: Plan, out_type: Any, scratch: Any, name: str, products: int
) -> Any:
    """A kernel of the plan's blocks of three warpgroups; products: of a tile of scores' size."""
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(plan.grid,),
        grid_names=("block",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )
    # A causal mask leaves half of the scores; keys and values are of about the same width.
    scores = plan.batch * plan.heads * plan.length**2 / 2
    return expected(kernel, operations=2 * products * scores * plan.key_width)
