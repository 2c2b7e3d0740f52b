"""Imports a checkpoint's tensors onto the devices, piece by piece, with bounded host memory.

Threads read what the devices of this process hold, each piece into a buffer that is used again. The
caller's thread sends a piece to its devices; there a donated update writes it, with those next to it,
into its place. Neither the host nor a device holds an array twice, and no device sends anything to
another. Packed experts stay packed: their words are reinterpreted on the device.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.pieces import Piece, held_arrays, in_file_order, neighbours
from kimi_jax.weights.placing import Writers, empty_arrays, finished, joined
from kimi_jax.weights.portions import Portion
from kimi_jax.weights.reader import Files, open_files
from kimi_jax.weights.reading import Readers, Span, cores, host_buffers, shares

# LOG.md, 2026-11-28 and 2026-11-30, has what others cost. Threads that read take cores from the one that
# sends, and from the runtime's own; and a read buffer waits while that one plans, sends or writes another.
# More buffers wait less, but leave the processor's cache, and then threads read slower.
READERS = min(16, max(8, cores() - 4))  # threads; at least 8, for files that are not in memory
BUFFERS = 3  # pieces that are between file and device
PIECE_BYTES = 64 << 20  # of a buffer, if a single row is not larger
SHARE_BYTES = 4 << 20  # what a thread reads at once: several fill a buffer
TOGETHER = 4  # pieces that one program writes
AHEAD = 2  # portions for each buffer that may be on the devices while an earlier one is still being read

_GLANCE = 0.0003  # seconds to wait for files while transfers are on their way


class _Plan(NamedTuple):
    """A portion, which of all it is, and what threads read for it."""

    place: int
    portion: Portion
    shares: Sequence[Sequence[Span]]


class _Plans:
    """All portions in their order, of which up to `ahead` can be planned before they are taken."""

    def __init__(self, portions: Sequence[Portion], ahead: int) -> None:
        self._waiting = deque(enumerate(portions))
        self._made: deque[_Plan] = deque()
        self._ahead = ahead

    def __bool__(self) -> bool:
        return bool(self._made or self._waiting)

    @property
    def next_place(self) -> int:
        return (self._made or self._waiting)[0][0]

    @property
    def wanted(self) -> bool:
        """Whether one more is to be planned."""
        return bool(self._waiting) and len(self._made) < self._ahead

    def make(self) -> None:
        place, portion = self._waiting.popleft()
        self._made.append(_Plan(place, portion, shares(portion.spans(), SHARE_BYTES)))

    def take(self) -> _Plan:
        if not self._made:
            self.make()
        return self._made.popleft()


def load_base(
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ONE_DEVICE,
) -> dict[str, Array]:
    """All weights of the base model, by path, where `kimi_jax.model.layout` places them.

    Host memory beyond what the process had: `BUFFERS` buffers of about `PIECE_BYTES`, or of one row that
    is larger, whatever the size of the model. Processes that share a mesh need the same files.

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
    in_groups = [_portions(group) for group in groups]
    sizes = [sum(portion.nbytes for portion in portions) for portions in in_groups]
    total, done = sum(sizes), 0
    files_used = {entry.file for entry in checkpoint.entries.values()}
    with (
        Writers(groups, ranks) as writers,
        open_files(files_used) as files,
        closing(_sent(files, [*chain(*in_groups)])) as sent,
    ):
        for number, pieces in enumerate(_in_order(in_groups, sent)):
            path = groups[number][0].held.array.path
            base[path] = writers.write(number, base[path], pieces)
            done += sizes[number]
            if progress is not None:
                progress(done, total)
    for held in arrays:
        base[held.array.path] = finished(held, base[held.array.path])
    return base


def _portions(group: Sequence[Piece]) -> list[Portion]:
    return [
        Portion(piece, start, devices)
        for piece in group
        for start, devices in piece.held.parts.items()
    ]


def _in_order(
    groups: Sequence[Sequence[Portion]], sent: Iterator[tuple[Portion, list[Array]]]
) -> Iterator[list[Array]]:
    """The pieces of each group as arrays, when all are sent. Every process has them in this order."""
    received: dict[int, list[Array]] = {}  # by portion
    waiting = deque(groups)
    for portion, copies in sent:
        received[id(portion)] = copies
        while waiting and all(id(portion) in received for portion in waiting[0]):
            yield [
                joined(piece, [*chain(*(received.pop(id(portion)) for portion in parts))])
                for piece, parts in groupby(waiting.popleft(), lambda portion: portion.piece)
            ]


def _sent(
    files: Files, portions: Sequence[Portion]
) -> Generator[tuple[Portion, list[Array]], None, None]:
    """Every portion that is on its way to its devices, nearly in order.

    A buffer that waits to be read into or to be sent costs time. So a portion is given out, to be placed,
    and the next one planned, when none does; or when as many wait to be placed as there are buffers.
    """
    largest = max(portion.nbytes for portion in portions)
    in_hand: dict[int, _Plan] = {}  # by the buffer that it is read into, the oldest first
    leaving: deque[tuple[int, list[Array]]] = deque()
    sent: deque[tuple[Portion, list[Array]]] = deque()
    with (
        host_buffers(min(BUFFERS, len(portions)), largest) as buffers,
        Readers(files, READERS) as readers,
    ):
        free = list(range(len(buffers)))  # the last first: it is most likely in the cache
        plans, ahead = _Plans(portions, len(buffers)), AHEAD * len(buffers)
        try:
            while plans or in_hand:
                while leaving and _arrived(leaving[0][1]):
                    free.append(leaving.popleft()[0])
                while plans and free and plans.next_place <= _oldest(in_hand, plans) + ahead:
                    number, plan = free.pop(), plans.take()
                    in_hand[number] = plan
                    readers.start(number, buffers[number], plan.shares)
                idle = not (sent or plans.wanted)
                read = readers.finished((_GLANCE if leaving else None) if idle and in_hand else 0)
                for number in read:
                    while len(sent) >= len(buffers):  # they take memory of the devices
                        yield sent.popleft()
                    portion = in_hand.pop(number).portion
                    portion.check(buffers[number])
                    view = portion.sent(buffers[number])
                    copies: list[Array] = []
                    # Before any copy is made: the buffer stays while there is one.
                    leaving.append((number, copies))
                    for device in portion.devices or (None,):
                        copies.append(copy_to(view, device))
                    sent.append((portion, copies))
                if read:
                    continue
                if sent:
                    yield sent.popleft()
                elif plans.wanted:
                    plans.make()
                elif not in_hand:
                    jax.block_until_ready(leaving[0][1])
            yield from sent
        finally:  # a buffer must not go while a device reads it
            jax.block_until_ready([copies for _, copies in leaving])


def _oldest(in_hand: Mapping[int, _Plan], plans: _Plans) -> int:
    return next(iter(in_hand.values())).place if in_hand else plans.next_place


def _arrived(copies: Sequence[Array]) -> bool:
    return all(copy.is_ready() for copy in copies)  # pyright: ignore[reportAttributeAccessIssue]


def copy_to(view: np.ndarray, device: Any) -> Array:
    """`view` on a device (None: where JAX puts what has no place), which may still be receiving it."""
    # A CPU device would take the buffer itself for its own, whatever `may_alias` says.
    platform = (device or jax.devices()[0]).platform
    return jax.device_put(view.copy() if platform == "cpu" else view, device)
