"""Arrays of the base model on their devices: made empty, then written in place, some pieces at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from kimi_jax.int4 import VALUES_PER_WORD, words_to_int4
from kimi_jax.model.layers import DTYPES
from kimi_jax.model.layout import Leaf
from kimi_jax.parallel.ranks import REPLICATED, Ranks
from kimi_jax.weights.pieces import Held, Piece

COMPILERS = 8  # threads

Group = Sequence[Piece]  # pieces of one array, equal in shape, that one program writes


def empty_arrays(arrays: Sequence[Held]) -> dict[str, Array]:
    """Zeros for each array, by path, where its parts belong, to be written and then `finished`."""
    made = [(held.array.path, *_stored(held), held.sharding) for held in arrays]
    return _zeros(tuple(made))()


def finished(held: Held, array: Array) -> Array:
    """An array that has all its pieces, as it is used.

    On a CPU, packed experts' words become int4 only now: XLA has no int4 arithmetic there, and would read
    and write all of an int4 array for each piece. So for a moment there is one array twice.
    """
    if not _as_words(held):
        return array
    return jax.block_until_ready(_unpacked(held.sharding)(array))


def joined(piece: Piece, received: Sequence[Array]) -> Array:
    """The devices' pieces as one array, side by side or, where devices hold the same, as copies."""
    held = piece.held
    if held.sharding is None:
        (whole,) = received
        return whole
    where = NamedSharding(held.sharding.mesh, held.piece_spec)
    return jax.make_array_from_single_device_arrays(_shape(piece), where, received)


class Writers:
    """The programs that write groups of pieces into their arrays, as a context.

    Threads compile them while files are read. One after the other, each when it is first needed, they
    hold an import up for seconds.
    """

    def __init__(self, groups: Sequence[Group], ranks: Ranks) -> None:
        self._groups = groups
        self._pool = ThreadPoolExecutor(COMPILERS)
        self._programs: list[tuple[jax.stages.Wrapped, Future[Any]]] = []  # of each group
        found: dict[Any, tuple[jax.stages.Wrapped, Future[Any]]] = {}
        for group in groups:
            program = _program(group)
            if program not in found:
                # Made here: two threads would make two, and JAX keeps programs by these.
                writer = _writer_of(group, ranks)
                found[program] = writer, self._pool.submit(_compile, group, ranks)
            self._programs.append(found[program])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def write(self, number: int, array: Array, pieces: Sequence[Array]) -> Array:
        """`array` with the pieces of a group in their places; the array that is given is used up.

        Args:
            number: of the group, among all.
            array: the one that they belong to.
            pieces: of the group.
        """
        writer, compiled = self._programs[number]
        compiled.result()
        return writer(array, tuple(pieces), _places(self._groups[number]))


def _program(group: Group) -> tuple[Any, ...]:
    """What groups that the same program writes have in common."""
    held = group[0].held
    array = (held.array.leaf, held.array.spec, *_stored(held))
    return *array, group[0].shape, held.piece_spec, held.dtype, len(group)


def _compile(group: Group, ranks: Ranks) -> None:
    lowered(group, ranks).compile()


def lowered(group: Group, ranks: Ranks) -> "jax.stages.Lowered":
    """The program of a group, for arrays where `empty_arrays` and `joined` put them.

    JAX keeps what is compiled from it for calls with such arrays.
    """
    held = group[0].held
    sharding = held.sharding
    where = None if sharding is None else NamedSharding(sharding.mesh, held.piece_spec)
    array = jax.ShapeDtypeStruct(*_stored(held), sharding=sharding)
    piece = jax.ShapeDtypeStruct(_shape(group[0]), held.dtype, sharding=where)
    return _writer_of(group, ranks).lower(array, (piece,) * len(group), _places(group))


def _places(group: Group) -> np.ndarray:
    """(layer, row) of each piece, or (row,) where layers are not stacked."""
    stacked = bool(group[0].held.array.weight.stack)
    places = [(piece.layer, piece.row) if stacked else (piece.row,) for piece in group]
    return np.asarray(places, np.int32)


def _shape(piece: Piece) -> tuple[int, ...]:
    """Of a piece on all its devices."""
    held = piece.held
    axis, parts = held.piece_spec[1], 1
    if held.sharding is not None and isinstance(axis, str):
        parts = held.sharding.mesh.shape[axis]
    return (piece.layers, parts * piece.rows, *held.row_shape)


def _stored(held: Held) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype in which an array is written."""
    if _as_words(held):
        return (*held.shape[:-1], held.shape[-1] // VALUES_PER_WORD), jnp.int32
    own = {"values": jnp.int4, "scale": jnp.bfloat16}.get(held.array.leaf)
    return held.shape, own or DTYPES[held.array.weight.storage]


def _as_words(held: Held) -> bool:
    if held.array.leaf != "values":
        return False
    device = jax.devices()[0] if held.sharding is None else next(iter(held.sharding.device_set))
    return device.platform == "cpu"


@cache
def _unpacked(sharding: NamedSharding | None) -> Callable[[Array], Array]:
    return jax.jit(words_to_int4, out_shardings=sharding)


@cache
def _zeros(
    arrays: tuple[tuple[str, tuple[int, ...], Any, NamedSharding | None], ...],
) -> Callable[[], dict[str, Array]]:
    return jax.jit(
        lambda: {path: jnp.zeros(shape, dtype) for path, shape, dtype, _ in arrays},
        out_shardings={path: sharding for path, _, _, sharding in arrays},
    )


def _writer_of(group: Group, ranks: Ranks) -> "jax.stages.Wrapped":
    held = group[0].held
    stacked = bool(held.array.weight.stack)
    leaf = "value" if _as_words(held) else held.array.leaf  # words are written as they are
    return _writer(leaf, stacked, held.array.spec, held.piece_spec, ranks)


@cache
def _writer(
    leaf: Leaf, stacked: bool, spec: PartitionSpec, piece_spec: PartitionSpec, ranks: Ranks
) -> "jax.stages.Wrapped":
    """`(array, pieces, (layer, row) of each) -> array`, in place: each device writes its own pieces."""

    def write(array: Array, pieces: tuple[Array, ...], places: Array) -> Array:
        for number, piece in enumerate(pieces):
            if leaf == "values":
                piece = words_to_int4(piece)
            elif leaf == "scale":
                piece = jnp.swapaxes(piece, -1, -2)
            piece = piece.astype(array.dtype) if stacked else piece[0].astype(array.dtype)
            place = [places[number, axis] for axis in range(places.shape[1])]
            start = [*place, *[0] * (array.ndim - len(place))]
            array = jax.lax.dynamic_update_slice(array, piece, start)
        return array

    placed = ranks.run(write, (spec, piece_spec, REPLICATED), spec)
    return jax.jit(placed, donate_argnums=0)
