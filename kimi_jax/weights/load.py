"""Imports a checkpoint's tensors onto the devices, piece by piece, with bounded host memory.

Threads read what the devices of this process hold, each piece into a buffer that is used again. The
caller's thread sends a piece to its devices; there a donated update writes it, with those next to it,
into its place. Neither the host nor a device holds an array twice, and no device sends anything to
another. Packed experts stay packed: their words are reinterpreted on the device.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from kimi_jax.errors import UserError
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.pieces import Piece, held_arrays, in_file_order, neighbours
from kimi_jax.weights.placing import Writers, empty_arrays, joined
from kimi_jax.weights.reader import DTYPES as FILE_DTYPES
from kimi_jax.weights.reader import Entry, Files, open_files
from kimi_jax.weights.reading import Readers, Span, host_buffers, shares

# LOG.md, 2026-11-28, has what others cost. All buffers together should fit the processor's cache, which
# the devices then read from; each piece costs Python a third of a millisecond, each program as much.
READERS = 16  # threads
BUFFERS = 8  # pieces that are between file and device
PIECE_BYTES = 32 << 20  # of a buffer, if a single row is not larger
SHARE_BYTES = 4 << 20  # what a thread reads at once: several fill a buffer
TOGETHER = 4  # pieces that one program writes
AHEAD = 2  # readings for each buffer that may be on the devices while an earlier one is still being read

_GLANCE = 0.0003  # seconds to wait for files while transfers are on their way


class _Reading(NamedTuple):
    """One piece for the devices whose parts begin at row `start`."""

    piece: Piece
    start: int
    devices: Sequence[Any]

    @property
    def nbytes(self) -> int:
        """Of the files."""
        return self.piece.nbytes + sum(entry.nbytes for _, entry in self.checks)

    @property
    def checks(self) -> list[tuple[str, Entry]]:
        """Tensors that repeat the shape of those in this piece."""
        held, piece = self.piece.held, self.piece
        first = self.start + piece.row
        layers = held.checks[piece.layer : piece.layer + piece.layers]
        return [check for layer in layers for check in layer[first : first + piece.rows]]


class _InHand(NamedTuple):
    """A reading that is being read, which of all it is, and what the files will say of its shapes."""

    place: int
    reading: _Reading
    shapes: list[np.ndarray]


def load_base(
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ONE_DEVICE,
) -> dict[str, Array]:
    """All weights of the base model, by path, where `kimi_jax.model.layout` places them.

    Host memory beyond what the process had: `BUFFERS` buffers of `PIECE_BYTES`, whatever the size
    of the model.

    Args:
        checkpoint: already matched with its config.
        progress: called with bytes that this process has read and placed so far, and that it reads in all.
        ranks: the devices. If one rank is alone, the arrays are rank 0's parts.

    Raises:
        UserError: what cannot be divided over the ranks, a weight of several dtypes, a `weight_shape`
            that contradicts its tensor, a file that cannot be read.
    """
    arrays = held_arrays(checkpoint, ranks)
    base = empty_arrays(arrays)
    groups = neighbours(in_file_order(arrays, PIECE_BYTES), TOGETHER)
    readings = [reading for group in groups for reading in _readings(group)]
    total, done = sum(reading.nbytes for reading in readings), 0
    files_used = {entry.file for entry in checkpoint.entries.values()}
    with (
        Writers(groups, ranks) as writers,
        open_files(files_used) as files,
        closing(_sent(files, readings)) as sent,
    ):
        for group, pieces in _in_order(groups, sent):
            path = group[0].held.array.path
            base[path] = writers.write(base[path], pieces, group)
            done += sum(reading.nbytes for reading in _readings(group))
            if progress is not None:
                progress(done, total)
    return base


def _readings(group: Sequence[Piece]) -> list[_Reading]:
    return [
        _Reading(piece, start, devices)
        for piece in group
        for start, devices in piece.held.parts.items()
    ]


def _in_order(
    groups: Sequence[Sequence[Piece]], sent: Iterator[tuple[_Reading, list[Array]]]
) -> Iterator[tuple[Sequence[Piece], list[Array]]]:
    """Groups all of whose pieces are sent, and these as arrays. Every process has them in this order."""
    received: dict[tuple[int, int], list[Array]] = {}  # by piece and its part's first row
    waiting = deque(groups)
    for reading, copies in sent:
        received[id(reading.piece), reading.start] = copies
        while waiting and all((id(r.piece), r.start) in received for r in _readings(waiting[0])):
            group = waiting.popleft()
            parts = [[received.pop((id(p), start)) for start in p.held.parts] for p in group]
            yield group, [joined(p, [*chain(*each)]) for p, each in zip(group, parts, strict=True)]


def _sent(
    files: Files, readings: Sequence[_Reading]
) -> Generator[tuple[_Reading, list[Array]], None, None]:
    """Every reading as soon as it is on its way to its devices, nearly in order."""
    waiting = deque(enumerate(readings))
    largest = max(reading.piece.nbytes for reading in readings)
    in_hand: dict[int, _InHand] = {}  # by the buffer that it is read into, the oldest first
    leaving: deque[tuple[int, list[Array]]] = deque()
    with (
        host_buffers(min(BUFFERS, len(readings)), largest) as buffers,
        Readers(files, READERS) as readers,
    ):
        free = list(range(len(buffers)))  # the last first: it is most likely in the cache
        ahead = AHEAD * len(buffers)
        try:
            while waiting or in_hand:
                while leaving and _arrived(leaving[0][1]):
                    free.append(leaving.popleft()[0])
                while waiting and free and waiting[0][0] <= _oldest(in_hand, waiting) + ahead:
                    number, (place, reading) = free.pop(), waiting.popleft()
                    shapes = [np.empty(2, FILE_DTYPES[entry.dtype]) for _, entry in reading.checks]
                    in_hand[number] = _InHand(place, reading, shapes)
                    spans = _spans(reading, buffers[number], shapes)
                    readers.start(number, shares(spans, SHARE_BYTES))
                if not in_hand:
                    jax.block_until_ready(leaving[0][1])
                    continue
                for number in readers.finished(_GLANCE if leaving and waiting else None):
                    _, reading, shapes = in_hand.pop(number)
                    _check(reading, shapes)
                    piece = reading.piece
                    view = buffers[number][: piece.nbytes]
                    view = view.view(piece.held.dtype).reshape(piece.shape)
                    copies: list[Array] = []
                    # Before any copy is made: the buffer stays while there is one.
                    leaving.append((number, copies))
                    for device in reading.devices or (None,):
                        copies.append(copy_to(view, device))
                    yield reading, copies
        finally:  # a buffer must not go while a device reads it
            jax.block_until_ready([copies for _, copies in leaving])


def _oldest(in_hand: Mapping[int, _InHand], waiting: Sequence[tuple[int, _Reading]]) -> int:
    return next(iter(in_hand.values())).place if in_hand else waiting[0][0]


def _arrived(copies: Sequence[Array]) -> bool:
    return all(copy.is_ready() for copy in copies)  # pyright: ignore[reportAttributeAccessIssue]


def _spans(reading: _Reading, buffer: np.ndarray, shapes: Sequence[np.ndarray]) -> list[Span]:
    """A piece's layers and rows side by side, as bytes, and each shape where its tensor is read."""
    piece, held = reading.piece, reading.piece.held
    first, end = reading.start + piece.row, 0
    spans = [
        Span(entry.file, entry.offset, (shape.view(np.uint8),))
        for (_, entry), shape in zip(reading.checks, shapes, strict=True)
    ]
    for layer in held.tensors[piece.layer : piece.layer + piece.layers]:
        if held.by_expert:
            wanted = [(entry, 0, entry.nbytes) for entry in layer[first : first + piece.rows]]
        else:
            wanted = [(layer[0], first * held.row_bytes, piece.rows * held.row_bytes)]
        for entry, begin, count in wanted:
            assert begin + count <= entry.nbytes
            spans.append(Span(entry.file, entry.offset + begin, (buffer[end : end + count],)))
            end += count
    assert end == piece.nbytes
    return sorted(spans, key=lambda span: (span.file, span.offset))


def _check(reading: _Reading, shapes: Sequence[np.ndarray]) -> None:
    """What the files say of the shapes in this piece, against what they are."""
    expected = reading.piece.held.array.weight.shape[1:]
    for (name, _), found in zip(reading.checks, shapes, strict=True):
        if (found[0], found[1]) != expected:
            raise UserError(
                f"{name}: says {found.tolist()}, but config.json and the packed tensor say "
                f"{list(expected)}"
            )


def copy_to(view: np.ndarray, device: Any) -> Array:
    """`view` on a device (None: where JAX puts what has no place), which may still be receiving it."""
    # A CPU device would take the buffer itself for its own, whatever `may_alias` says.
    platform = (device or jax.devices()[0]).platform
    return jax.device_put(view.copy() if platform == "cpu" else view, device)
