"""What an import reads for whom: each array of the base tree, cut into pieces of bounded size.

A piece has the same place in every device's part of an array; the parts begin at different rows
(experts, where there are experts). Devices of this process whose parts begin at the same row are
served by one reading.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from kimi_jax.weights.reader import DTYPES, Entry

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

    @cached_property
    def row_bytes(self) -> int:
        """Of one row of the file."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def piece_spec(self) -> PartitionSpec:
        """Of a piece [layers, rows, …]: its rows lie where the array's lie."""
        spec = self.array.spec
        rows_at = 1 if self.array.weight.stack else 0
        return PartitionSpec(None, spec[rows_at] if len(spec) > rows_at else None)


class Piece(NamedTuple):
    """Some layers of a part and all its rows, or some rows of one layer; counted within the part."""

    held: Held
    layer: int
    layers: int
    row: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one device's piece, as the file has it."""
        return (self.layers, self.rows, *self.held.row_shape)

    @property
    def nbytes(self) -> int:
        """Of one device's piece."""
        return self.layers * self.rows * self.held.row_bytes

    def sources(self, start: int) -> list[tuple[Entry, int, int]]:
        """What a piece is made of, for devices whose parts begin at row `start`: tensor, first byte, bytes.

        One expert each, or of each layer the piece's rows.
        """
        first, row_bytes = start + self.row, self.held.row_bytes
        layers = self.held.tensors[self.layer : self.layer + self.layers]
        if self.held.by_expert:
            rows = slice(first, first + self.rows)
            return [(entry, 0, row_bytes) for layer in layers for entry in layer[rows]]
        return [(layer[0], first * row_bytes, self.rows * row_bytes) for layer in layers]


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
    """Covers one device's part of an array with pieces of about `at_most` bytes, or one row."""
    layers = len(held.tensors)
    layer_bytes = held.rows * held.row_bytes
    if layer_bytes <= at_most:
        together = _equal_parts(layers, max(1, at_most // max(1, layer_bytes)))
        for layer in range(0, layers, together):
            yield Piece(held, layer, min(together, layers - layer), 0, held.rows)
        return
    together = _equal_parts(held.rows, max(1, at_most // held.row_bytes))
    for layer in range(layers):
        for row in range(0, held.rows, together):
            yield Piece(held, layer, 1, row, min(together, held.rows - row))


def in_file_order(arrays: Sequence[Held], at_most: int) -> list[Piece]:
    """All pieces layer by layer: a checkpoint's files hold a layer each, or some."""
    stacks = ("", "dense_layers", "moe_layers")
    pieces = [piece for held in arrays for piece in pieces_of(held, at_most)]
    return sorted(pieces, key=lambda p: (stacks.index(p.held.array.weight.stack), p.layer))


def neighbours(pieces: Sequence[Piece], at_most: int) -> list[list[Piece]]:
    """Pieces that follow each other in a layer of an array, at most so many together, equal in shape."""
    groups = []
    for _, alike in groupby(pieces, lambda piece: (id(piece.held), piece.layer, piece.shape)):
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
