"""Where the bytes of one piece stand in a checkpoint's files, and where they go to in a buffer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.errors import UserError
from kimi_jax.weights.pieces import Piece
from kimi_jax.weights.reader import DTYPES, Entry


class Span(NamedTuple):
    """A file's bytes from `offset` on, and where they go: ranges of a buffer, one after the other."""

    file: Path
    offset: int
    into: tuple[tuple[int, int], ...]


class Reading(NamedTuple):
    """One piece for the devices whose parts begin at row `start`.

    A buffer holds the piece as it is sent, and behind it the tensors that say what shape it has.
    """

    piece: Piece
    start: int
    devices: Sequence[Any]

    @property
    def nbytes(self) -> int:
        """Of the files."""
        return self.piece.nbytes + sum(entry.nbytes for _, entry in self.checks)

    @property
    def buffer_bytes(self) -> int:
        """Of the buffer that it is read into."""
        return self.piece.sent_bytes + sum(entry.nbytes for _, entry in self.checks)

    @property
    def checks(self) -> list[tuple[str, Entry]]:
        """Tensors that repeat the shape of those in this piece."""
        held, piece = self.piece.held, self.piece
        if not held.checks:
            return []
        first = self.start + piece.row
        layers = held.checks[piece.layer : piece.layer + piece.layers]
        return [check for layer in layers for check in layer[first : first + piece.rows]]

    def spans(self) -> list[Span]:
        """Everything that is read, in the order of the files."""
        piece, found = self.piece, []
        count, slot = piece.nbytes // piece.segments, piece.slot
        sources = zip(piece.sources(self.start), piece.shifts(self.start), strict=True)
        for number, ((entry, begin), shift) in enumerate(sources):
            assert begin + count <= entry.nbytes
            place = number * slot + shift
            found.append(Span(entry.file, entry.offset + begin, ((place, place + count),)))
        place = piece.sent_bytes
        for _, entry in self.checks:
            found.append(Span(entry.file, entry.offset, ((place, place + entry.nbytes),)))
            place += entry.nbytes
        return sorted(found)

    def check(self, buffer: np.ndarray) -> None:
        """Compares what the files say of the shapes in this piece with what they are.

        Raises:
            UserError: they differ.
        """
        expected = list(self.piece.held.array.weight.shape[1:])
        place = self.piece.sent_bytes
        for name, entry in self.checks:
            found = buffer[place : place + entry.nbytes].view(DTYPES[entry.dtype]).tolist()
            place += entry.nbytes
            if found != expected:
                raise UserError(
                    f"{name}: says {found}, but config.json and the packed tensor say {expected}"
                )

    def sent(self, buffer: np.ndarray) -> np.ndarray:
        """The piece in a buffer, as the devices get it."""
        view = buffer[: self.piece.sent_bytes].view(self.piece.held.dtype)
        return view.reshape(self.piece.shape)


def shares(spans: Iterable[Span], nbytes: int) -> list[list[Span]]:
    """Spans for one thread each: about so many bytes, longer ones cut, those that join in a file joined.

    Args:
        spans: in the order of their files.
        nbytes: of a share; it is at most half as large again.
    """
    found: list[list[Span]] = []
    size = end = 0  # of the last share: its bytes, and where its last span ends
    most = 1.5 * nbytes
    for file, offset, ranges in spans:
        for begin, stop in ranges:
            step = nbytes if stop - begin > most else stop - begin
            for first in range(begin, stop, step):
                part = (first, min(first + step, stop))
                count = part[1] - first
                if not found or size + count > most:
                    found.append([])
                    size = 0
                share = found[-1]
                if share and (share[-1].file, end) == (file, offset):
                    share[-1] = Span(file, share[-1].offset, (*share[-1].into, part))
                else:
                    share.append(Span(file, offset, (part,)))
                offset += count
                size, end = size + count, offset
    return found
