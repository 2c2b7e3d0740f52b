"""Imports a checkpoint's tensors into the base tree, layer by layer, with bounded host memory.

Threads read one layer of one weight at a time from the mapped files, of routed experts a few at a
time; each piece is written into its place in the stack on the device by a donated update, so that
neither the host nor the device ever holds a stack twice. Packed experts stay packed: their words are
reinterpreted on the device.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kimi_jax.errors import UserError
from kimi_jax.int4 import words_to_int4
from kimi_jax.model.layers import DTYPES
from kimi_jax.model.params import Weight, scale_shape
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.names import Part

READERS = 8
AHEAD = 4  # pieces that may wait in host memory
PIECE_BYTES = 256 << 20  # experts are read together up to about this size

# Where a part of a weight is held, below the weight's path.
_LEAF: dict[Part, str] = {"value": "weight", "packed": "values", "scale": "scale"}


class _Piece(NamedTuple):
    """One layer of one part of one weight, or some experts of it."""

    path: str
    weight: Weight
    layer: int
    part: Part
    first_expert: int
    names: tuple[str, ...]  # one tensor, or one for each expert


def load_base(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> dict[str, Array]:
    """All weights of the base model, by path, on the default device.

    Args:
        checkpoint: already matched with its config.
        progress: called with bytes read so far and bytes in all.

    Raises:
        UserError: a `weight_shape` that contradicts its tensor.
    """
    pieces = list(_pieces(checkpoint))
    total = sum(checkpoint.entries[name].nbytes for name in checkpoint.tensors)
    base: dict[str, Array] = {}
    done = 0
    with ThreadPoolExecutor(READERS) as pool:
        for piece, host in _read_ahead(pool, partial(_read, checkpoint), pieces):
            if not piece.weight.stack:
                base[piece.path] = jnp.asarray(host, DTYPES[piece.weight.storage])
            elif piece.part != "shape":
                if piece.path not in base:
                    base[piece.path] = _empty(piece)
                place = (piece.layer, piece.first_expert)
                base[piece.path] = _place(base[piece.path], host, place, piece.part)
            done += host.nbytes
            if progress is not None:
                progress(done, total)
    return base


def base_path(weight: Weight, part: Part) -> str:
    """Path of a part of a weight in the base tree, as the module tree has it."""
    if weight.role in ("embedding", "router"):
        return weight.path
    return f"{weight.path}.{_LEAF[part]}"


def _pieces(checkpoint: Checkpoint) -> Iterator[_Piece]:
    names: dict[tuple[str, int, Part], list[str]] = {}
    weights = {weight.path: weight for weight in checkpoint.table}
    for tensor in checkpoint.tensors.values():
        names.setdefault((tensor.weight.path, tensor.layer, tensor.part), []).append(tensor.name)
    for (path, layer, part), members in names.items():
        weight = weights[path]
        place = base_path(weight, part) if part != "shape" else path
        together = max(1, PIECE_BYTES // max(1, checkpoint.entries[members[0]].nbytes))
        for first in range(0, len(members), together):
            yield _Piece(
                place, weight, layer, part, first, tuple(members[first : first + together])
            )


def _read(checkpoint: Checkpoint, piece: _Piece) -> np.ndarray:
    """One piece in host memory: a tensor's bytes, or those of a layer's experts side by side."""
    views = [checkpoint.entries[name].read() for name in piece.names]
    if piece.part == "shape":
        for name, view in zip(piece.names, views, strict=True):
            if tuple(view.tolist()) != piece.weight.shape[1:]:
                raise UserError(
                    f"{name}: says {view.tolist()}, but config.json and the packed tensor say "
                    f"{list(piece.weight.shape[1:])}"
                )
    if piece.weight.role == "routed":
        return np.stack(views)
    return np.array(views[0])


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[_Piece], np.ndarray], pieces: Iterable[_Piece]
) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Pieces in order, with at most `AHEAD` read or being read beyond the one in hand."""
    waiting: deque[tuple[_Piece, Future[np.ndarray]]] = deque()
    for piece in pieces:
        waiting.append((piece, pool.submit(read, piece)))
        if len(waiting) > AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _empty(piece: _Piece) -> Array:
    shape = piece.weight.stacked_shape
    if piece.part == "packed":
        return jnp.zeros(shape, jnp.int4)
    if piece.part == "scale":
        return jnp.zeros(scale_shape(shape), jnp.bfloat16)
    return jnp.zeros(shape, DTYPES[piece.weight.storage])


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _place(stack: Array, piece: Array, place: tuple[Array, Array], part: Part) -> Array:
    """Writes a piece at (layer, first expert, or 0 in a weight without experts)."""
    if part == "packed":
        piece = words_to_int4(piece)
    elif part == "scale":
        piece = jnp.swapaxes(piece, -1, -2)
    start = (*place, *[0] * (stack.ndim - 2))
    return jax.lax.dynamic_update_slice(stack, piece.astype(stack.dtype)[None], start)
