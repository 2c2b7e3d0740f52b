"""What the Hopper kernels' pipelines share: shared-memory layouts, and the warpgroups' two roles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kimi_jax.kernels.grouped_matmul.lanes import CONTRACTION
from kimi_jax.kernels.latency import expected

# Threads meet at barriers that the kernels place themselves.
PARAMETERS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
Accumulator = plgpu.WGMMAAccumulatorRef


def swizzled(rows: int, columns: int, swizzle: int) -> tuple[Any, ...]:
    """Transforms of shared memory in tiles of rows × columns, the columns filling the swizzle's bytes."""
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((rows, columns)), swizzling(swizzle)


OPERAND = swizzled(8, CONTRACTION, 128)  # bf16 rows of 64 as WGMMA reads them


def rows_memory(shape: tuple[int, ...], interpret: bool) -> Any:
    """Shared memory for bf16 rows of 64 that are copied from anywhere, then multiplied.

    The same bytes twice: tiled by 1 row for copies, which may then begin at any row, and by 8 for
    WGMMA, which wants to be told so; in a tile as wide as the swizzle it makes no difference. The
    interpreter knows no unions, and needs none.
    """
    any_row = plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(1, CONTRACTION, 128))
    multiplied = plgpu.SMEM(shape, jnp.bfloat16, transforms=OPERAND)
    return multiplied if interpret else plgpu.RefUnion(any_row, multiplied)


def both_views(ref: Any, interpret: bool) -> tuple[Any, Any]:
    """`rows_memory` as copies write it and as WGMMA reads it."""
    return (ref, ref) if interpret else tuple(ref)


def launch(
    name: str,
    run: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    blocks: int,
    warpgroups: int,
    scratch: dict[str, Any],
    interpret: bool,
    operations: float = 0,
    moved: float = 0,
) -> Callable[..., Any]:
    """A kernel of so many blocks, a function of its operands.

    Args:
        name: in profiles.
        run: its code; it gets references to operands, result and scratch.
        out: the result.
        blocks: axis "block". warpgroups: of a block, axis "warpgroup".
        scratch: shared memory and barriers by name.
        interpret: run on the CPU.
        operations, moved: of a call, see `latency.expected`.
    """
    kernel = plgpu.kernel(
        run,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=PARAMETERS,
        kernel_name=name,
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return expected(kernel, operations, moved)


@dataclass(frozen=True)
class Ring:
    """Stages of shared memory in turn: filled by one warpgroup's copies, used by others.

    full: barriers on which copies arrive. empty: by which those that compute release a stage.
    """

    stages: int
    full: Any
    empty: Any

    @staticmethod
    def barriers(stages: int, copies: int, computing: int) -> dict[str, Any]:
        """Scratch for `full`, with so many copies a stage, and `empty`."""
        return {
            "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
        }

    def slot(self, step: Any) -> Any:
        """Where a step's operands stand."""
        return lax.rem(step, jnp.int32(self.stages))

    def fill(self, first: Any, steps: Any, copy: Callable[[Any, Any, Any], None]) -> Any:
        """Calls copy(k, slot, barrier) for steps first + k as slots become empty; the step after."""

        def one(k: Any, _: None) -> None:
            slot = self.slot(first + k)
            plgpu.barrier_wait(self.empty.at[slot])
            copy(k, slot, self.full.at[slot])

        lax.fori_loop(0, steps, one, None)
        return first + steps

    def use(self, first: Any, steps: Any, work: Callable[[Any], None]) -> None:
        """Calls work(slot), which waits for its own multiplications, as slots become full."""

        def one(k: Any, _: None) -> None:
            slot = self.slot(first + k)
            plgpu.barrier_wait(self.full.at[slot])
            work(slot)
            plgpu.barrier_arrive(self.empty.at[slot])

        lax.fori_loop(0, steps, one, None)


def share(items: Any, blocks: int, work: Callable[[Any, Any], Any], turns: int = 1) -> None:
    """Calls step = work(item, step) for each item of this block's share, step from 0.

    The items are cut into as many stretches as turns; of a stretch, its `blocks` blocks take every
    blocks-th. Blocks begin in order, so that those at work together read neighbouring items.
    """
    block, blocks_of_turn = lax.axis_index("block"), jnp.int32(blocks)
    stretch = lax.div(items + (blocks * turns - 1), jnp.int32(blocks * turns)) * blocks
    turn = lax.div(block, blocks_of_turn)
    first = turn * stretch + lax.rem(block, blocks_of_turn)
    end = jnp.minimum(items, (turn + 1) * stretch)
    mine = lax.div(end - first + (blocks - 1), blocks_of_turn)
    lax.fori_loop(0, mine, lambda n, step: work(first + n * blocks, step), jnp.int32(0))


def specialise(
    computing: int,
    stages: int,
    empty: Any,
    move: Callable[[], None],
    compute: Callable[[], None],
    registers: tuple[int, int] | None = None,
) -> None:
    """The last warpgroup moves, the others compute.

    Args:
        computing: how many compute.
        stages: of the pipeline; all are empty at first.
        empty: barriers by which those that compute release a stage.
        move: fills stages as they become empty.
        compute: works on stages as they become full, and releases each.
        registers: of a moving and of a computing thread.
    """
    is_mover = lax.axis_index("warpgroup") == computing

    @pl.when(is_mover)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")
        move()
        for slot in range(stages):  # no barrier is left in the middle of a phase
            plgpu.barrier_wait(empty.at[slot])

    @pl.when(jnp.logical_not(is_mover))
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        for slot in range(stages):
            plgpu.barrier_arrive(empty.at[slot])
        compute()


def sliced(ref: Any, rows: int) -> Any:
    """The first rows of a reference, itself where that is all of them."""
    return ref if ref.shape[0] == rows else ref.at[pl.ds(0, rows)]
