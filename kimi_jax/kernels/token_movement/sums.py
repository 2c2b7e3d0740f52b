"""Each token's rows of a window summed on Hopper: `combine_window` reads the rows that are there.

A gather would read some row for every assignment, though most of them stand in other devices'
windows. Sums are fp32, in the order of a token's assignments. `add_window` adds them in place, and
leaves alone the tokens that have no row in the window.
"""

from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Int

from kimi_jax.kernels.latency import expected

THREADS, VECTOR = 128, 8  # elements that a thread loads at once
WIDEST = 64 * THREADS  # then a thread holds 64 sums
REQUIRED = f"bfloat16, a multiple of {THREADS * VECTOR} up to {WIDEST} wide"
BLOCKS = 132 * 4


def takes(y: Array) -> bool:
    """Whether rows are bf16 and of a width that a block's threads share evenly."""
    width = y.shape[-1]
    return y.dtype == jnp.bfloat16 and width % (THREADS * VECTOR) == 0 and width <= WIDEST


def sum_rows(
    y_CD: BFloat16[Array, "C D"],
    row_A: Int[Array, " A"],
    k: int,
    start: Int[Array, ""],
    total: Int[Array, ""],
    onto_TD: BFloat16[Array, "tokens D"] | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "tokens D"]:
    """out[t] = Σ over j of y[row[t · k + j] - start], where that is a row of y and row < total.

    Args:
        y_CD: rows, `takes` said yes.
        row_A: the sorted row of each assignment, A = k · tokens.
        k: assignments of a token.
        start: of the window.
        total: rows at or beyond this one are nobody's.
        onto_TD: what the sums are added to, in its own memory if nobody else needs it; none: zeros.
        interpret: run on the CPU.
    """
    capacity, width = y_CD.shape
    tokens = row_A.shape[0] // k
    blocks = 2 if interpret else BLOCKS
    adds = onto_TD is not None
    kernel = plgpu.kernel(
        partial(_sum_block, k=k, tokens=tokens, blocks=blocks, adds=adds),
        out_type=() if adds else jax.ShapeDtypeStruct((tokens, width), y_CD.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="add_rows" if adds else "sum_rows",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    bounds = jnp.stack([start, jnp.clip(total - start, 0, capacity)]).astype(jnp.int32)
    if onto_TD is None:
        return expected(kernel, moved=y_CD.nbytes * (1 + tokens / capacity))(y_CD, row_A, bounds)
    out = jax.new_ref(onto_TD)
    expected(kernel, moved=3 * y_CD.nbytes)(
        y_CD, row_A, bounds, out
    )  # at most a token for each row
    return jax.freeze(out)


def _sum_block(
    y: Any, row: Any, bounds: Any, out: Any, *, k: int, tokens: int, blocks: int, adds: bool
) -> None:
    """What one block does: every `blocks`-th token.

    `bounds` are the window's first row and how many there are; `adds`: to what `out` holds.
    """
    block, first, end = lax.axis_index("block"), bounds[0], bounds[1]
    layout: Any = plgpu.Layout.WG_STRIDED((y.shape[1],), vec_size=VECTOR)
    mine = lax.div(tokens - block + (blocks - 1), jnp.int32(blocks))

    def load(row: Any) -> Any:
        return plgpu.load(row, layout=layout, optimized=False).astype(jnp.float32)

    def rows_of(n: Any) -> tuple[Any, ...]:
        return tuple(row[(block + n * blocks) * k + j] for j in range(k))

    def summed(places: list[Any], inside: list[Any]) -> Any:
        total = plgpu.layout_cast(jnp.zeros((y.shape[1],), jnp.float32), layout)
        for place, here in zip(places, inside, strict=True):

            def add(total: Any, place: Any = place) -> Any:
                return total + load(y.at[place])

            total = lax.cond(here, add, lambda total: total, total)
        return total

    def one(n: Any, rows: tuple[Any, ...]) -> tuple[Any, ...]:
        # The next token's, asked for a token ahead: this one's rows are waited for meanwhile.
        following = rows_of(jnp.minimum(n + 1, mine - 1))
        token = block + n * blocks
        places = [place - first for place in rows]
        inside = [(place >= 0) & (place < end) for place in places]
        if adds:

            @pl.when(reduce(or_, inside))
            def _() -> None:
                before = load(out.at[token])  # asked for with the rows, and added last
                out[token] = (summed(places, inside) + before).astype(jnp.bfloat16)

        else:
            out[token] = summed(places, inside).astype(jnp.bfloat16)
        return following

    @pl.when(mine > 0)
    def _() -> None:
        lax.fori_loop(0, mine, one, rows_of(jnp.int32(0)))
