"""What is read at a time: where it stands in a checkpoint's files, and where it goes to in a buffer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.errors import UserError
from kimi_jax.weights.pieces import Piece
from kimi_jax.weights.reader import DTYPES, Entry
from kimi_jax.weights.reading import Span


class Portion(NamedTuple):
    """A piece for the devices whose parts begin at row `start`.

    A buffer holds the piece, and behind it the tensors that say what shape it has.
    """

    piece: Piece
    start: int
    devices: Sequence[Any]

    @property
    def nbytes(self) -> int:
        """Of the files, and of the buffer that they are read into."""
        return self.piece.nbytes + sum(entry.nbytes for _, entry in self.checks)

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
        sources = self.piece.sources(self.start)
        sources += [(entry, 0, entry.nbytes) for _, entry in self.checks]
        found, place = [], 0
        for entry, begin, count in sources:
            assert begin + count <= entry.nbytes
            found.append(Span(entry.file, entry.offset + begin, ((place, place + count),)))
            place += count
        assert place == self.nbytes
        return sorted(found)

    def check(self, buffer: np.ndarray) -> None:
        """Compares what the files say of the shapes in this piece with what they are.

        Raises:
            UserError: they differ.
        """
        expected = list(self.piece.held.array.weight.shape[1:])
        place = self.piece.nbytes
        for name, entry in self.checks:
            found = buffer[place : place + entry.nbytes].view(DTYPES[entry.dtype]).tolist()
            place += entry.nbytes
            if found != expected:
                raise UserError(
                    f"{name}: says {found}, but config.json and the packed tensor say {expected}"
                )

    def sent(self, buffer: np.ndarray) -> np.ndarray:
        """The piece in a buffer."""
        view = buffer[: self.piece.nbytes].view(self.piece.held.dtype)
        return view.reshape(self.piece.shape)
