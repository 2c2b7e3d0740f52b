"""Onto eight devices as onto one, bit for bit, with bounded memory and nothing read twice."""

import threading

import jax
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.weights import load
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.load import load_base
from kimi_jax.weights.pieces import held_arrays, pieces_of
from kimi_jax.weights.reader import Files
from tests.unit.support import change_shard, write_tiny_checkpoint

EXPERTS = 16
# Pieces of several layers, of some experts, and of some rows.
SMALL_PIECE = 3_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("load") / "checkpoint"
    write_tiny_checkpoint(directory, n_routed_experts=EXPERTS, num_hidden_layers=4)
    return open_checkpoint(directory)


@pytest.fixture(scope="module")
def on_one(checkpoint):
    return {path: np.asarray(value) for path, value in load_base(checkpoint).items()}


@pytest.fixture
def reads(monkeypatch):
    """What was asked of the files: (file, first byte, bytes), in no order."""
    asked, real = [], Files.read

    def read(self, entry, begin, into):
        asked.append((entry.file.name, entry.offset + begin, into.nbytes))
        real(self, entry, begin, into)

    monkeypatch.setattr(Files, "read", read)
    return asked


def assert_same(found, expected, path):
    found = np.asarray(found)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
    assert found.tobytes() == expected.tobytes(), path


@pytest.mark.parametrize(
    ("expert", "data", "rest"),
    [(8, 1, "sharded"), (8, 1, "replicated"), (4, 2, "sharded")],
)
def test_eight_devices_hold_what_one_holds(
    checkpoint, on_one, monkeypatch, reads, expert, data, rest
):
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    ranks = Ranks(expert, data, make_mesh(expert, data), rest=rest)
    calls = []
    base = load_base(checkpoint, lambda done, total: calls.append((done, total)), ranks)
    assert base.keys() == on_one.keys()
    for path, value in base.items():
        assert_same(value, on_one[path], path)
    # One process: every byte is read, and none twice, whoever holds copies of it.
    total = sum(checkpoint.entries[name].nbytes for name in checkpoint.tensors)
    assert len(set(reads)) == len(reads)
    assert sum(count for _, _, count in reads) == total
    assert calls[-1] == (total, total)


def test_arrays_live_where_the_layout_says(checkpoint):
    """Guards a place that is only reached by a gather: memory, and time at every step."""
    ranks = Ranks(8, 1, make_mesh(8))
    base = load_base(checkpoint, ranks=ranks)
    for held in held_arrays(checkpoint, ranks):
        value = base[held.array.path]
        assert value.sharding.is_equivalent_to(ranks.sharding(held.array.spec), value.ndim)
    values = base["moe_layers.mlp.experts.gate_proj.values"]
    assert values.addressable_shards[0].data.shape[1] == EXPERTS // 8


def test_alone_is_the_first_of_the_ranks(checkpoint, on_one, reads):
    base = load_base(checkpoint, ranks=Ranks(8, alone=True))
    asked = sum(count for _, _, count in reads)
    spread = load_base(checkpoint, ranks=Ranks(8, 1, make_mesh(8)))
    for path, value in base.items():
        assert_same(value, np.asarray(spread[path].addressable_shards[0].data), path)
    held = {held.array.path: held for held in held_arrays(checkpoint, Ranks(8, alone=True))}
    assert {path: h.shape for path, h in held.items()} == {p: v.shape for p, v in base.items()}
    shapes = sum(
        checkpoint.entries[name].nbytes
        for name, tensor in checkpoint.tensors.items()
        if tensor.part == "shape" and tensor.expert < EXPERTS // 8
    )
    pieces = [piece for each in held.values() for piece in pieces_of(each, 1 << 20)]
    assert asked == shapes + sum(piece.nbytes for piece in pieces)


def test_parts_begin_where_their_devices_do(checkpoint):
    """Experts and vocabulary by rank, the rest by rows or whole; who reads what follows from it."""
    ranks = Ranks(4, 2, make_mesh(4, 2))
    for held in held_arrays(checkpoint, ranks):
        spread = "expert" in held.array.spec
        assert list(held.parts) == [n * held.rows for n in range(4 if spread else 1)]
        replicas = {len(devices) for devices in held.parts.values()}
        assert replicas == {2 if spread else 8}


@pytest.mark.parametrize("at_most", [1, 100, SMALL_PIECE, 1 << 20])
def test_pieces_cover_each_part_once(checkpoint, at_most):
    for held in held_arrays(checkpoint, Ranks(8, alone=True)):
        covered = np.zeros((len(held.tensors), held.rows), int)
        for piece in pieces_of(held, at_most):
            layers = slice(piece.layer, piece.layer + piece.layers)
            covered[layers, piece.row : piece.row + piece.rows] += 1
            assert piece.nbytes <= max(at_most, held.row_bytes)
        assert (covered == 1).all()


def test_a_write_exchanges_nothing_and_copies_nothing(checkpoint):
    """Neither a collective between devices nor a second copy of the stack."""
    ranks = Ranks(8, 1, make_mesh(8))
    for held in held_arrays(checkpoint, ranks):
        piece = next(pieces_of(held, SMALL_PIECE))
        weight, spec = held.array.weight, held.array.spec
        write = load._writer(held.array.leaf, bool(weight.stack), spec, held.piece_spec, ranks)
        shape = (piece.layers, piece.rows * max(1, len(held.parts)), *held.row_shape)
        compiled = write.lower(
            load._empty(held),
            jax.ShapeDtypeStruct(
                shape, held.dtype, sharding=jax.NamedSharding(ranks.mesh, held.piece_spec)
            ),
            np.zeros(2 if weight.stack else 1, np.int32),
        ).compile()
        text = compiled.as_text()
        for exchange in ("all-gather", "all-reduce", "all-to-all", "collective", "reduce-scatter"):
            assert exchange not in text, (held.array.path, exchange)
        assert "input_output_alias" in text, held.array.path
        if held.array.leaf != "value":  # the largest: one is enough to see a copy
            break


def test_host_memory_is_bounded(checkpoint, monkeypatch):
    """At most a buffer for each reader is between file and device, whatever the size of the model."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(load, "READERS", 3)
    lock, now, most, sizes = threading.Lock(), [0], [0], set()
    real = load.copy_to

    def copy(view, device):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            sizes.add(view.base.base.nbytes if view.base.base is not None else view.nbytes)
        try:
            return real(view, device)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(load, "copy_to", copy)
    load_base(checkpoint)
    largest = max(
        piece.nbytes
        for held in held_arrays(checkpoint, Ranks())
        for piece in pieces_of(held, SMALL_PIECE)
    )
    page = load.mmap.PAGESIZE
    assert 1 <= most[0] <= 3
    assert max(sizes) <= 3 * (-(-largest // page) * page)
    assert largest <= SMALL_PIECE


def test_a_file_that_has_become_shorter(checkpoint, tmp_path):
    directory = tmp_path / "checkpoint"
    write_tiny_checkpoint(directory)
    opened = open_checkpoint(directory)
    path = next(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"safetensors: has become shorter while it was being read"):
        load_base(opened)


def test_a_contradiction_of_one_expert_is_found_on_a_mesh(tmp_path):
    directory = tmp_path / "checkpoint"
    write_tiny_checkpoint(directory, n_routed_experts=EXPERTS)
    name = "model.layers.1.mlp.experts.13.up_proj.weight_shape"

    def change(tensors):
        tensors[name] = tensors[name][::-1].copy()

    change_shard(directory, change)
    with pytest.raises(UserError, match=f"{name}: says"):
        load_base(open_checkpoint(directory), ranks=Ranks(8, 1, make_mesh(8)))
