"""What an import reads for whom: each array of the base tree, cut into pieces of bounded size.

A piece has the same place in every device's part of an array; the parts begin at different rows
(experts, where there are experts). Devices of this process whose parts begin at the same row are
served by one reading.

Tensors begin anywhere in a file. The system copies memory fastest to where it lies in a page as it did;
some processors take five times as long to a few bytes behind (LOG.md, 2026-11-28). So a piece is sent as
slots that have room for that, and the device takes what it needs out of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.errors import UserError
from kimi_jax.model.layout import BaseArray, Leaf, base_arrays
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.parallel.sharding import local_shape
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.names import Part
from kimi_jax.weights.reader import DTYPES, PAGE, Entry

LARGE = 16 * PAGE  # bytes of a segment from which on it lies as in its file within a page
LINE = 64  # bytes of the processor's cache, within which smaller ones do

_PART: dict[Leaf, Part] = {"value": "value", "values": "packed", "scale": "scale"}


@dataclass(frozen=True)
class Held:
    """One array of the base tree, as the devices of this process hold it.

    Attributes:
        array: path, whole shape and spec.
        shape: of the array that is made: the whole one, or one rank's part where a rank is alone.
        sharding: on the mesh; None on one device.
        tensors: for each layer its tensor, or those of its experts.
        checks: the same for the tensors that repeat the shape of packed experts; empty for others.
        parts: first row of a device's part, and the devices that hold it; none: where JAX puts what has
            no place.
        rows: of one device's part of one layer.
    """

    array: BaseArray
    shape: tuple[int, ...]
    sharding: NamedSharding | None
    tensors: Sequence[Sequence[Entry]]
    checks: Sequence[Sequence[tuple[str, Entry]]]
    parts: Mapping[int, Sequence[Any]]
    rows: int

    @property
    def by_expert(self) -> bool:
        """Whether a row is an expert, with a tensor of its own."""
        return self.array.weight.role == "routed"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one row, as the file has it."""
        shape = self.tensors[0][0].shape
        return shape if self.by_expert else shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Of the file."""
        return np.dtype(DTYPES[self.tensors[0][0].dtype])

    @property
    def row_bytes(self) -> int:
        """Of one row of the file."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def piece_spec(self) -> PartitionSpec:
        """Of a piece [segments, items]: each device's are its own, or all have the same."""
        spec = self.array.spec
        rows_at = 1 if self.array.weight.stack else 0
        return PartitionSpec(spec[rows_at] if len(spec) > rows_at else None)

    @property
    def starts(self) -> range:
        """First rows of all devices' parts, other processes' too."""
        axis, count = self.piece_spec[0], 1
        if self.sharding is not None and isinstance(axis, str):
            count = self.sharding.mesh.shape[axis]
        return range(0, count * self.rows, self.rows)


class Piece(NamedTuple):
    """Some layers of a part and all its rows, or some rows of one layer; counted within the part.

    A segment is what lies side by side in a file: an expert, or the piece's rows of a layer.
    """

    held: Held
    layer: int
    layers: int
    row: int
    rows: int

    @property
    def content(self) -> tuple[int, ...]:
        """Shape of one device's piece without the slots: as the file has it."""
        return (self.layers, self.rows, *self.held.row_shape)

    @property
    def nbytes(self) -> int:
        """Of one device's piece, in the files."""
        return self.layers * self.rows * self.held.row_bytes

    @property
    def segments(self) -> int:
        """Of one device's piece."""
        return self.layers * self.rows if self.held.by_expert else self.layers

    @property
    def segment_bytes(self) -> int:
        """Of each segment."""
        return self.nbytes // self.segments

    @property
    def slot(self) -> int:
        """Bytes from a segment's place to the next one's, if both are shifted alike."""
        return slot_bytes(self.segment_bytes)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one device's piece as it is sent: slots, and items of a slot."""
        return self.segments, self.slot // self.held.dtype.itemsize

    @property
    def sent_bytes(self) -> int:
        """Of one device's piece as it is sent."""
        return self.segments * self.slot

    def sources(self, start: int) -> list[tuple[Entry, int]]:
        """Tensor and first byte in it of each segment, for devices whose parts begin at row `start`."""
        first = start + self.row
        layers = self.held.tensors[self.layer : self.layer + self.layers]
        if self.held.by_expert:
            return [(entry, 0) for layer in layers for entry in layer[first : first + self.rows]]
        return [(layer[0], first * self.held.row_bytes) for layer in layers]

    def shifts(self, start: int) -> list[int]:
        """Bytes by which each segment lies behind the beginning of its slot: as it does in the file.

        Whole items: what a file has in the midst of one lies at the beginning.
        """
        aligned, item = _aligned(self.segment_bytes), self.held.dtype.itemsize
        found = [(entry.offset + begin) % aligned for entry, begin in self.sources(start)]
        return [0 if shift % item else shift for shift in found]


def slot_bytes(segment: int) -> int:
    """Bytes that have room for a segment of so many, wherever it begins."""
    aligned = _aligned(segment)
    return -(-(segment + aligned - 1) // aligned) * aligned


def _aligned(segment: int) -> int:
    return PAGE if segment >= LARGE else LINE


def held_arrays(checkpoint: Checkpoint, ranks: Ranks) -> list[Held]:
    """Every array of the base, in the order of the table.

    Raises:
        UserError: a dimension that cannot be divided over the ranks, an array whose tensors differ in dtype.
    """
    found: dict[tuple[str, Part], dict[int, list[str]]] = {}
    for tensor in checkpoint.tensors.values():
        layers = found.setdefault((tensor.weight.path, tensor.part), {})
        layers.setdefault(tensor.layer, []).append(tensor.name)
    return [
        _held(checkpoint, array, found, ranks)
        for array in base_arrays(checkpoint.table, ranks).values()
    ]


def pieces_of(held: Held, at_most: int) -> Iterator[Piece]:
    """Covers one device's part of an array with pieces of about `at_most` bytes as sent, or one row."""
    layers = len(held.tensors)
    layer = held.rows * held.row_bytes
    sent = held.rows * slot_bytes(held.row_bytes) if held.by_expert else slot_bytes(layer)
    if sent <= at_most:
        together = _equal_parts(layers, max(1, at_most // max(1, sent)))
        for first in range(0, layers, together):
            yield Piece(held, first, min(together, layers - first), 0, held.rows)
        return
    row = slot_bytes(held.row_bytes) if held.by_expert else held.row_bytes
    together = _equal_parts(held.rows, max(1, at_most // row))
    for first in range(layers):
        for begin in range(0, held.rows, together):
            yield Piece(held, first, 1, begin, min(together, held.rows - begin))


def in_file_order(arrays: Sequence[Held], at_most: int) -> list[Piece]:
    """All pieces layer by layer: a checkpoint's files hold a layer each, or some."""
    stacks = ("", "dense_layers", "moe_layers")
    pieces = [piece for held in arrays for piece in pieces_of(held, at_most)]
    return sorted(pieces, key=lambda p: (stacks.index(p.held.array.weight.stack), p.layer))


def neighbours(pieces: Sequence[Piece], at_most: int) -> list[list[Piece]]:
    """Pieces that follow each other in a layer of an array, at most so many together, equal in size."""
    groups = []
    for _, alike in groupby(pieces, lambda piece: (id(piece.held), piece.layer, piece.content)):
        run = list(alike)
        size = _equal_parts(len(run), at_most)
        groups += [run[begin : begin + size] for begin in range(0, len(run), size)]
    return groups


def _equal_parts(count: int, at_most: int) -> int:
    """How many of `count` go together: each other shape of a piece is a program to compile."""
    if count <= at_most:
        return max(1, count)
    divisors = (size for size in range(at_most, at_most // 2, -1) if count % size == 0)
    return next(divisors, at_most)


def _held(
    checkpoint: Checkpoint,
    array: BaseArray,
    found: Mapping[tuple[str, Part], Mapping[int, list[str]]],
    ranks: Ranks,
) -> Held:
    weight, spec = array.weight, array.spec
    rows_at = 1 if weight.stack else 0
    assert all(axis is None for n, axis in enumerate(spec) if n != rows_at), "only rows are spread"
    local = local_shape(array.path, array.shape, spec, ranks.mesh_shape)
    sharding = ranks.sharding(spec)
    parts: dict[int, list[Any]] = {}
    if sharding is None:
        parts[0] = []
    else:
        for device, index in sharding.addressable_devices_indices_map(array.shape).items():
            assert index is not None
            parts.setdefault(index[rows_at].start or 0, []).append(device)

    def entries(part: Part) -> list[list[tuple[str, Entry]]]:
        by_layer = found.get((weight.path, part), {})
        return [
            [(name, checkpoint.entries[name]) for name in by_layer[n]] for n in sorted(by_layer)
        ]

    tensors = entries(_PART[array.leaf])
    _check_dtypes(tensors)
    return Held(
        array,
        local if sharding is None else array.shape,
        sharding,
        [[entry for _, entry in layer] for layer in tensors],
        entries("shape") if array.leaf == "values" else [],
        dict(sorted(parts.items())),
        local[rows_at],
    )


def _check_dtypes(tensors: Sequence[Sequence[tuple[str, Entry]]]) -> None:
    """Pieces are read as bytes of one dtype."""
    first, expected = tensors[0][0]
    for layer in tensors:
        for name, entry in layer:
            if entry.dtype != expected.dtype:
                raise UserError(
                    f"{name} is {entry.dtype}, but {first} is {expected.dtype}; the same weight must have "
                    "one dtype in all layers. Convert either."
                )
