"""Onto eight devices as onto one, bit for bit, with bounded memory and nothing read twice."""

import shutil
import threading
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.weights import load, placing
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.load import load_base
from kimi_jax.weights.pieces import Piece, held_arrays, in_file_order, neighbours, pieces_of
from kimi_jax.weights.reader import Files
from kimi_jax.weights.reading import PAGE
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

    def read(self, file, offset, into):
        asked.append((file.name, offset, sum(array.nbytes for array in into)))
        real(self, file, offset, into)

    monkeypatch.setattr(Files, "read", read)
    return asked


def assert_same(found, expected, path):
    found = np.asarray(found)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
    assert found.tobytes() == expected.tobytes(), path


def in_files(piece):
    """Bytes of a piece of the first part."""
    return b"".join(
        entry.read().tobytes()[begin : begin + count] for entry, begin, count in piece.sources(0)
    )


@pytest.mark.parametrize(
    ("expert", "data", "rest"),
    [(8, 1, "sharded"), (8, 1, "replicated"), (4, 2, "sharded")],
)
def test_eight_devices_hold_what_one_holds(
    checkpoint, on_one, monkeypatch, reads, expert, data, rest
):
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(load, "SHARE_BYTES", 700)
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
    whole = [piece for each in held.values() for piece in pieces_of(each, 1 << 20)]
    assert asked == shapes + sum(piece.nbytes for piece in whole)


def test_parts_begin_where_their_devices_do(checkpoint):
    """Experts and vocabulary by rank, the rest by rows or whole; who reads what follows from it."""
    ranks = Ranks(4, 2, make_mesh(4, 2))
    for held in held_arrays(checkpoint, ranks):
        spread = "expert" in held.array.spec
        assert list(held.parts) == [n * held.rows for n in range(4 if spread else 1)]
        replicas = {len(devices) for devices in held.parts.values()}
        assert replicas == {2 if spread else 8}


@pytest.mark.parametrize("expert", [1, 8])
def test_experts_that_are_written_as_int4(checkpoint, on_one, monkeypatch, expert):
    """As on a GPU, where no second copy of the array may be made at the end."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(placing, "_as_words", lambda held: False)
    ranks = load.ONE_DEVICE if expert == 1 else Ranks(expert, 1, make_mesh(expert))
    for path, value in load_base(checkpoint, ranks=ranks).items():
        assert_same(value, on_one[path], path)


def moved(source, target, data_begins):
    """Copies a checkpoint so that the tensors of each file begin at this byte of a page."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + length].rstrip()
        text += b" " * ((data_begins - 8 - len(text)) % PAGE)
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize("expert", [1, 8])
@pytest.mark.parametrize("data_begins", [0, 8, 13, 4_088, 4_095])
def test_wherever_tensors_begin_in_a_file(
    checkpoint, on_one, monkeypatch, tmp_path, data_begins, expert
):
    """A file of another writer may even have items that begin at an odd byte."""
    monkeypatch.setattr(load, "PIECE_BYTES", 4 * SMALL_PIECE)
    moved(checkpoint.directory, tmp_path / "moved", data_begins)
    opened = open_checkpoint(tmp_path / "moved")
    assert {entry.offset % PAGE for entry in opened.entries.values()} >= {data_begins}
    ranks = load.ONE_DEVICE if expert == 1 else Ranks(expert, 1, make_mesh(expert))
    for path, value in load_base(opened, ranks=ranks).items():
        assert_same(value, on_one[path], path)


def test_what_waits_to_be_placed_is_bounded(checkpoint, monkeypatch):
    """Reading may be faster than placing, and what is sent takes memory of the devices."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    sent = []

    class Here:
        def is_ready(self):
            return True

    class AtOnce:
        """Has always read something more."""

        def __init__(self, files, count):
            self.tags = []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def start(self, tag, memory, spans):
            self.tags.append(tag)

        def finished(self, timeout):
            return [self.tags.pop(0)] if self.tags else []

    def copy(view, device):
        sent.append(view)
        return Here()

    monkeypatch.setattr(load, "Readers", AtOnce)
    monkeypatch.setattr(load, "copy_to", copy)
    monkeypatch.setattr(load.Portion, "check", lambda *_: None)
    groups = neighbours(in_file_order(held_arrays(checkpoint, Ranks()), SMALL_PIECE), 4)
    portions = [portion for group in groups for portion in load._portions(group)]
    for given_out, _ in enumerate(load._sent(None, portions)):
        assert len(sent) - given_out <= load.BUFFERS + 1
    assert len(sent) == len(portions) > 20 * load.BUFFERS


def test_portions_are_planned_ahead_and_taken_in_their_order(checkpoint):
    groups = neighbours(in_file_order(held_arrays(checkpoint, Ranks()), SMALL_PIECE), 4)
    portions = [portion for group in groups for portion in load._portions(group)][:7]
    plans, taken = load._Plans(portions, 2), []
    while plans:
        while plans.wanted and len(taken) != 3:  # the fourth has to be planned when it is taken
            plans.make()
        assert plans.next_place == len(taken)
        taken.append(plans.take())
    assert [plan.portion for plan in taken] == portions
    assert [plan.place for plan in taken] == list(range(7))
    assert all(plan.shares for plan in taken)
    plans = load._Plans(portions, 2)
    made = 0
    while plans.wanted:
        plans.make()
        made += 1
    assert made == 2


def test_pieces_of_two_sizes_are_not_written_together(checkpoint):
    """A program writes pieces of one shape."""
    divided = [held for held in held_arrays(checkpoint, Ranks()) if held.rows >= 5]
    assert divided
    for held in divided:
        pieces = [Piece(held, 0, 1, 0, 2), Piece(held, 0, 1, 2, 2), Piece(held, 0, 1, 4, 1)]
        assert neighbours(pieces, 4) == [pieces[:2], pieces[2:]]


def test_shapes_of_experts_in_two_integer_types(tmp_path):
    """The public files have 32 bits, the writing library 64: what stands behind a piece differs in length."""
    directory = tmp_path / "checkpoint"
    write_tiny_checkpoint(directory, n_routed_experts=EXPERTS)
    expected = {
        path: np.asarray(value) for path, value in load_base(open_checkpoint(directory)).items()
    }
    names = []

    def change(tensors):
        found = [name for name in tensors if name.endswith("weight_shape")]
        for name in found[::2]:
            wide = np.int64 if tensors[name].dtype == np.int32 else np.int32
            tensors[name] = tensors[name].astype(wide)
            names.append(name)

    change_shard(directory, change)
    opened = open_checkpoint(directory)
    assert {entry.nbytes for name, entry in opened.entries.items() if "weight_shape" in name} == {
        8,
        16,
    }
    for path, value in load_base(opened).items():
        assert_same(value, expected[path], path)
    assert names


@pytest.mark.parametrize("at_most", [1, 100, SMALL_PIECE, 1 << 20])
def test_pieces_cover_each_part_once(checkpoint, at_most):
    for held in held_arrays(checkpoint, Ranks(8, alone=True)):
        covered = np.zeros((len(held.tensors), held.rows), int)
        for piece in pieces_of(held, at_most):
            layers = slice(piece.layer, piece.layer + piece.layers)
            covered[layers, piece.row : piece.row + piece.rows] += 1
            assert piece.nbytes <= max(at_most, held.row_bytes)
        assert (covered == 1).all()


def test_host_memory_is_bounded(checkpoint, monkeypatch):
    """No more is between file and device than the buffers hold, whatever the size of the model."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(load, "BUFFERS", 3)
    made, sent, real = [], [], (load.host_buffers, load.copy_to)

    @contextmanager
    def buffers(count, nbytes):
        with real[0](count, nbytes) as found:
            made.extend(found)
            yield found

    def copy(view, device):
        sent.append(view)
        return real[1](view, device)

    monkeypatch.setattr(load, "host_buffers", buffers)
    monkeypatch.setattr(load, "copy_to", copy)
    load_base(checkpoint)
    assert len(made) == 3
    assert SMALL_PIECE / 2 < sum(buffer.nbytes for buffer in made) / 3 <= 4096
    assert all(any(np.shares_memory(view, buffer) for buffer in made) for view in sent)


def test_a_buffer_waits_for_its_device(checkpoint, on_one, monkeypatch):
    """A buffer is read into again only when what it held has arrived."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(load, "BUFFERS", 2)
    late = []  # what a device has not read yet: it takes the bytes when it is asked for the third time

    class Late:
        def __init__(self, view):
            self.view, self.asked, self.found = view, 0, None

        def is_ready(self):
            self.asked += 1
            if self.asked == 3:
                self.land()
            return self.found is not None

        def land(self):
            if self.found is None:
                self.found = self.view.copy()

    def copy(view, device):
        late.append(Late(view))
        return late[-1]

    placed = []

    def write(self, number, array, pieces):
        placed.append((self._groups[number], pieces))
        return array

    monkeypatch.setattr(load, "copy_to", copy)
    monkeypatch.setattr(load, "joined", lambda piece, copies: copies[0])
    monkeypatch.setattr(load.Writers, "write", write)
    real = load.jax.block_until_ready

    def block(tree):
        for copy in load.jax.tree.leaves(tree):
            copy.land() if isinstance(copy, Late) else real(copy)
        return tree

    monkeypatch.setattr(load.jax, "block_until_ready", block)
    load_base(checkpoint)
    for group, sent in placed:
        for piece, each in zip(group, sent, strict=True):
            assert each.found.tobytes() == in_files(piece), piece.held.array.path
    assert sum(len(group) for group, _ in placed) == len(late)


@pytest.mark.parametrize("expert", [1, 8])
def test_a_reading_that_stalls_holds_the_others_up(checkpoint, monkeypatch, expert):
    """What is sent and cannot be placed takes memory of the devices."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(load, "BUFFERS", 3)
    real, first, go_on, sent = (Files.read, load.copy_to), [], threading.Event(), []

    def read(self, file, offset, into):
        if not first:
            first.append(offset)
            threading.Timer(1.5, lambda: (seen.append(len(sent)), go_on.set())).start()
            go_on.wait(20)
        real[0](self, file, offset, into)

    def copy(view, device):
        sent.append(view.nbytes)
        return real[1](view, device)

    monkeypatch.setattr(Files, "read", read)
    monkeypatch.setattr(load, "copy_to", copy)
    seen = []
    ranks = load.ONE_DEVICE if expert == 1 else Ranks(expert, 1, make_mesh(expert))
    load_base(checkpoint, ranks=ranks)
    copies = 1 if expert == 1 else 8  # of what every device holds
    assert 0 < seen[0] <= 6 * copies < len(sent)


def test_a_weight_of_two_dtypes_is_refused(tmp_path):
    directory = tmp_path / "checkpoint"
    write_tiny_checkpoint(directory, num_hidden_layers=4)
    name = "model.layers.3.mlp.gate.e_score_correction_bias"

    def change(tensors):
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    change_shard(directory, change)
    with pytest.raises(UserError, match=f"{name} is BF16, but .*layers.1.* is F32"):
        load_base(open_checkpoint(directory))


def test_arrays_are_what_the_files_hold(checkpoint, monkeypatch):
    """Against the tensors themselves, read one by one; packed ones have tests of their own."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(load, "SHARE_BYTES", 700)
    base = load_base(checkpoint)
    for held in held_arrays(checkpoint, Ranks()):
        if held.array.leaf != "values":
            layers = [[entry.read() for entry in layer] for layer in held.tensors]
            found = np.stack([np.stack(layer) if held.by_expert else layer[0] for layer in layers])
            if held.array.leaf == "scale":
                found = np.swapaxes(found, -1, -2)
            value = np.asarray(base[held.array.path])
            found = found if held.array.weight.stack else found[0]
            assert (value == found.astype(value.dtype)).all(), held.array.path


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
