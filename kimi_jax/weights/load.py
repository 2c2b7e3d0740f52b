"""Imports a checkpoint's tensors onto the devices, piece by piece, with bounded host memory.

Threads read what the devices of this process hold, each piece into a buffer that is used again, and
send it to its devices; there a donated update writes it into its place. Neither the host nor a
device holds an array twice, and no device sends anything to another. Packed experts stay packed:
their words are reinterpreted on the device.
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from kimi_jax.errors import UserError
from kimi_jax.int4 import words_to_int4
from kimi_jax.model.layers import DTYPES
from kimi_jax.model.layout import Leaf
from kimi_jax.parallel.ranks import ONE_DEVICE, REPLICATED, Ranks
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.pieces import Held, Piece, held_arrays, in_file_order
from kimi_jax.weights.reader import DTYPES as FILE_DTYPES
from kimi_jax.weights.reader import Entry, Files, open_files

READERS = 16  # threads; each has one buffer
# Of a buffer, if a single row is not larger. Each piece costs Python half a millisecond, each buffer its
# pages: with 16 MiB an import is slower by a third, with 64 no faster (LOG.md, 2026-11-27).
PIECE_BYTES = 32 << 20
AHEAD = 2  # readings for each reader that may wait, in device memory, for those before them

_ALIGNED = 4096  # bytes, where a buffer begins


class _Reading(NamedTuple):
    """One piece for the devices whose parts begin at row `start`."""

    piece: Piece
    start: int
    devices: Sequence[Any]

    @property
    def nbytes(self) -> int:
        """Of the files."""
        held, piece = self.piece.held, self.piece
        checks = (entry.nbytes for _, entry in _checks(held, piece, self.start))
        return piece.nbytes + sum(checks)


def load_base(
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ONE_DEVICE,
) -> dict[str, Array]:
    """All weights of the base model, by path, where `kimi_jax.model.layout` places them.

    Host memory beyond what the process had: `READERS` buffers of `PIECE_BYTES`, whatever the size
    of the model.

    Args:
        checkpoint: already matched with its config.
        progress: called with bytes that this process has read so far, and that it reads in all.
        ranks: the devices. If one rank is alone, the arrays are rank 0's parts.

    Raises:
        UserError: a `weight_shape` that contradicts its tensor, a file that cannot be read.
    """
    arrays = held_arrays(checkpoint, ranks)
    readings = [
        _Reading(piece, start, devices)
        for piece in in_file_order(arrays, PIECE_BYTES)
        for start, devices in piece.held.parts.items()
    ]
    total = sum(reading.nbytes for reading in readings)
    largest = max(reading.piece.nbytes for reading in readings)
    base = {held.array.path: _empty(held) for held in arrays}
    done = 0
    received: list[Array] = []
    files_used = {entry.file for entry in checkpoint.entries.values()}
    with (
        open_files(files_used) as files,
        host_buffers(min(READERS, len(readings)), largest) as free,
        ThreadPoolExecutor(READERS) as pool,
    ):
        for reading, copies in _read_ahead(pool, partial(_send, files, free), readings):
            received += copies
            done += reading.nbytes
            if progress is not None:
                progress(done, total)
            piece, held = reading.piece, reading.piece.held
            if reading.start == max(held.parts):  # every device has its own by now
                path = held.array.path
                base[path] = _place(base[path], _joined(piece, received), piece, ranks)
                received = []
    return base


def _send(files: Files, free: "SimpleQueue[np.ndarray]", reading: _Reading) -> list[Array]:
    """Reads one piece and returns it on each of its devices; the buffer is free again then."""
    piece, held = reading.piece, reading.piece.held
    for name, entry in _checks(held, piece, reading.start):
        _check_shape(files, name, entry, held.array.weight.shape[1:])
    buffer = free.get()
    try:
        _read(files, piece, reading.start, buffer)
        view = buffer[: piece.nbytes].view(held.dtype).reshape(piece.shape)
        copies = [copy_to(view, device) for device in reading.devices or (None,)]
        return [copy.block_until_ready() for copy in copies]
    finally:
        free.put(buffer)


def _read(files: Files, piece: Piece, start: int, buffer: np.ndarray) -> None:
    """Layers and rows side by side, as bytes."""
    held, end = piece.held, 0
    first = start + piece.row
    for layer in held.tensors[piece.layer : piece.layer + piece.layers]:
        if held.by_expert:
            wanted = [(entry, 0, entry.nbytes) for entry in layer[first : first + piece.rows]]
        else:
            wanted = [(layer[0], first * held.row_bytes, piece.rows * held.row_bytes)]
        for entry, begin, count in wanted:
            files.read(entry, begin, buffer[end : end + count])
            end += count
    assert end == piece.nbytes


def _check_shape(files: Files, name: str, entry: Entry, expected: tuple[int, ...]) -> None:
    found = np.empty(2, FILE_DTYPES[entry.dtype])
    files.read(entry, 0, found.view(np.uint8))
    if (found[0], found[1]) != expected:
        raise UserError(
            f"{name}: says {found.tolist()}, but config.json and the packed tensor say "
            f"{list(expected)}"
        )


def _checks(held: Held, piece: Piece, start: int) -> list[tuple[str, Entry]]:
    first = start + piece.row
    layers = held.checks[piece.layer : piece.layer + piece.layers]
    return [check for layer in layers for check in layer[first : first + piece.rows]]


def copy_to(view: np.ndarray, device: Any) -> Array:
    """`view` on a device (None: where JAX puts what has no place), which may still be receiving it."""
    # A CPU device would take the buffer itself for its own, whatever `may_alias` says.
    platform = (device or jax.devices()[0]).platform
    return jax.device_put(view.copy() if platform == "cpu" else view, device)


@contextmanager
def host_buffers(count: int, nbytes: int) -> "Iterator[SimpleQueue[np.ndarray]]":
    """Buffers of at least `nbytes` each, in memory that a GPU may read by itself."""
    size = -(-max(nbytes, 1) // _ALIGNED) * _ALIGNED
    mapping = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # advice, which some kernels do not take: fewer pages to take and pin
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    buffers = np.split(memory, count)
    with ThreadPoolExecutor(count) as pool:  # taking the pages one after the other costs much more
        list(pool.map(_touch, buffers))
    free: SimpleQueue[np.ndarray] = SimpleQueue()
    for buffer in buffers:
        free.put(buffer)
    with _mapped(memory):
        yield free


def _touch(memory: np.ndarray) -> None:
    memory.fill(0)


@contextmanager
def _mapped(memory: np.ndarray) -> Iterator[None]:
    """Memory that the GPUs read directly. Without it each transfer is copied once more on the way."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        yield
        return
    address = memory.ctypes.data
    device.client.dma_map(address, memory.nbytes)
    try:
        yield
    finally:
        device.client.dma_unmap(address)


def _read_ahead(
    pool: ThreadPoolExecutor,
    read: Callable[[_Reading], list[Array]],
    readings: Iterable[_Reading],
) -> Iterator[tuple[_Reading, list[Array]]]:
    """Readings in order, with at most so many made or being made beyond the one in hand."""
    waiting: deque[tuple[_Reading, Future[list[Array]]]] = deque()
    try:
        for reading in readings:
            waiting.append((reading, pool.submit(read, reading)))
            if len(waiting) > AHEAD * READERS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _joined(piece: Piece, received: list[Array]) -> Array:
    """The devices' pieces as one array, side by side or, where devices hold the same, as copies."""
    held = piece.held
    if held.sharding is None:
        (whole,) = received
        return whole
    axis = held.piece_spec[1]
    parts = held.sharding.mesh.shape[axis] if isinstance(axis, str) else 1
    shape = (piece.layers, parts * piece.rows, *held.row_shape)
    sharding = NamedSharding(held.sharding.mesh, held.piece_spec)
    return jax.make_array_from_single_device_arrays(shape, sharding, received)


def _empty(held: Held) -> Array:
    dtype = {"values": jnp.int4, "scale": jnp.bfloat16}.get(held.array.leaf)
    return _zeros(held.shape, dtype or DTYPES[held.array.weight.storage], held.sharding)()


@cache
def _zeros(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding | None
) -> Callable[[], Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _place(array: Array, piece: Array, where: Piece, ranks: Ranks) -> Array:
    held = where.held
    stacked = bool(held.array.weight.stack)
    write = _writer(held.array.leaf, stacked, held.array.spec, held.piece_spec, ranks)
    place = (where.layer, where.row) if stacked else (where.row,)
    return write(array, piece, np.asarray(place, np.int32))


@cache
def _writer(
    leaf: Leaf, stacked: bool, spec: PartitionSpec, piece_spec: PartitionSpec, ranks: Ranks
) -> Callable[[Array, Array, np.ndarray], Array]:
    """`(array, piece, (layer, row)) -> array`, in place: each device writes its own piece."""

    def write(array: Array, piece: Array, place: Array) -> Array:
        if leaf == "values":
            piece = words_to_int4(piece)
        elif leaf == "scale":
            piece = jnp.swapaxes(piece, -1, -2)
        piece = piece.astype(array.dtype) if stacked else piece[0].astype(array.dtype)
        start = [*place, *[0] * (array.ndim - len(place))]
        return jax.lax.dynamic_update_slice(array, piece, start)

    placed = ranks.run(write, (spec, piece_spec, REPLICATED), spec)
    return jax.jit(placed, donate_argnums=0)
