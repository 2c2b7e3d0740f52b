"""Rows copied to several places each on Hopper: `dispatch` reads every token once, not K times.

A gather by destination reads a token's row again for each of its experts, from memory, since all
tokens are more than the cache holds. Here a block loads a row into shared memory and stores it K
times. Every place is written once, so nothing depends on the order.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Int

from kimi_jax.kernels.latency import expected

LINE = 256  # elements that one dimension of a copy may have
BLOCKS = 132  # one a multiprocessor
# Rows made zero behind the last that is somebody's: kernels work on tiles of rows, and those that sum
# over a tile want what is behind the groups to be finite. No tile has more rows than this.
CLEARED = 256
MEMORY = 200 * 1024  # bytes of rows in flight in a block
WIDEST = LINE * (MEMORY // (4 * 2 * LINE))  # with four rows in it
REQUIRED = f"bfloat16, a multiple of {LINE} up to {WIDEST} wide"


def takes(x: Array) -> bool:
    """Whether rows are bf16 and of a width that can be copied."""
    return x.dtype == jnp.bfloat16 and x.shape[-1] % LINE == 0 and x.shape[-1] <= WIDEST


def scatter_rows(
    x_TD: BFloat16[Array, "tokens D"],
    row_A: Int[Array, " A"],
    k: int,
    start: Int[Array, ""],
    total: Int[Array, ""],
    capacity: int,
    interpret: bool = False,
) -> BFloat16[Array, "C D"]:
    """out[row[t · k + j] - start] = x[t], where that is a place of the output and row < total.

    Args:
        x_TD: tokens, `takes` said yes.
        row_A: a permutation of 0 … A - 1, A = k · tokens.
        k: places of a token.
        start: the first row that is wanted.
        total: of the rows from this one on, the first `CLEARED` are zero, and the others unwritten.
        capacity: rows of the output.
        interpret: run on the CPU.
    """
    tokens, width = x_TD.shape
    lines, blocks = width // LINE, 2 if interpret else BLOCKS
    stages = min(12, MEMORY // (2 * width) - 1)

    def body(*operands: Any, **scratch: Any) -> None:
        _Block(tokens, k, capacity, stages, blocks, *operands, **scratch).run()

    end = jnp.clip(total - start, 0, capacity)  # of the output's rows that are somebody's
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((capacity, lines, LINE), x_TD.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="scatter_rows",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        scratch_types={
            "stage": plgpu.SMEM((stages, lines, LINE), x_TD.dtype),
            "zero": plgpu.SMEM((lines, LINE), x_TD.dtype),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        },
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    moved = x_TD.nbytes * (1 + capacity / tokens)
    bounds = jnp.stack([start, end]).astype(jnp.int32)
    out = expected(kernel, moved=moved)(x_TD.reshape(tokens, lines, LINE), row_A, bounds)
    return out.reshape(capacity, width)


@dataclass(frozen=True)
class _Block:
    """References in global memory from x on, then in shared memory. bounds: start and end."""

    tokens: int
    k: int
    capacity: int
    stages: int
    blocks: int
    x: Any
    row: Any
    bounds: Any
    out: Any
    stage: Any
    zero: Any
    full: Any

    def run(self) -> None:
        """Every blocks-th token from this block's own, then its share of the zeros behind the last row."""
        mine = self.share(self.tokens)
        for n in range(self.stages - 1):
            pl.when(n < mine)(lambda n=n: self.load(jnp.int32(n)))

        def stored(n: Any, places: tuple[Any, ...]) -> tuple[Any, ...]:
            # Asked for a token ahead, so that no token waits for its own.
            following = self.places(jnp.minimum(n + 1, mine - 1))
            self.store(n, places, mine)
            return following

        @pl.when(mine > 0)
        def _() -> None:
            lax.fori_loop(0, mine, stored, self.places(jnp.int32(0)))

        self.zero[...] = jnp.zeros(self.zero.shape, self.zero.dtype)
        plgpu.commit_smem()
        end = self.bounds[1]
        cleared = jnp.minimum(self.capacity - end, CLEARED)
        lax.fori_loop(0, self.share(cleared), lambda n, _: self.clear(end, n), None)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    def share(self, items: Any) -> Any:
        """How many of so many items are this block's."""
        return lax.div(items - lax.axis_index("block") + (self.blocks - 1), jnp.int32(self.blocks))

    def item(self, n: Any) -> Any:
        """This block's nth item."""
        return lax.axis_index("block") + n * self.blocks

    def slot(self, n: Any) -> Any:
        """Where its nth token stands."""
        return lax.rem(n, jnp.int32(self.stages))

    def places(self, n: Any) -> tuple[Any, ...]:
        """The sorted rows of its nth token."""
        return tuple(self.row[self.item(n) * self.k + j] for j in range(self.k))

    def load(self, n: Any) -> None:
        """Begins to copy the nth token here."""
        slot = self.slot(n)
        plgpu.copy_gmem_to_smem(self.x.at[self.item(n)], self.stage.at[slot], self.full.at[slot])

    def store(self, n: Any, places: tuple[Any, ...], mine: Any) -> None:
        """Begins to copy the nth token to its places, and to load the next one that finds room."""
        slot, first, end = self.slot(n), self.bounds[0], self.bounds[1]
        plgpu.barrier_wait(self.full.at[slot])
        for row in places:
            place = row - first

            @pl.when((place >= 0) & (place < end))
            def _(place: Any = place) -> None:
                target = self.out.at[place]
                plgpu.copy_smem_to_gmem(self.stage.at[slot], target, commit_group=False)

        plgpu.commit_smem_to_gmem_group()
        # All stores but this token's have read their stage.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        following = n + (self.stages - 1)
        pl.when(following < mine)(lambda: self.load(following))

    def clear(self, end: Any, n: Any) -> None:
        """Begins to write zeros to the nth row beyond the last one that is somebody's."""
        plgpu.copy_smem_to_gmem(self.zero, self.out.at[end + self.item(n)], commit_group=False)
