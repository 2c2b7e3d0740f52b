"""Programs that write pieces into place: in place, without exchange, compiled once and beside the reading."""

import threading

import jax
import numpy as np
import pytest

from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks
from kimi_jax.weights import load, placing
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.pieces import held_arrays, in_file_order, neighbours
from tests.unit.support import write_tiny_checkpoint

SMALL_PIECE = 3_000
TOGETHER = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("placing") / "checkpoint"
    write_tiny_checkpoint(directory, n_routed_experts=16, num_hidden_layers=4)
    return open_checkpoint(directory)


def groups_of(checkpoint, ranks):
    arrays = held_arrays(checkpoint, ranks)
    return neighbours(in_file_order(arrays, SMALL_PIECE), TOGETHER)


def test_neighbours_are_equal_and_complete(checkpoint):
    arrays = held_arrays(checkpoint, ONE_DEVICE)
    pieces = in_file_order(arrays, SMALL_PIECE)
    groups = neighbours(pieces, TOGETHER)
    assert [piece for group in groups for piece in group] == pieces
    assert max(len(group) for group in groups) == TOGETHER
    for group in groups:
        assert len({(id(piece.held), piece.layer, piece.shape) for piece in group}) == 1


def test_a_write_exchanges_nothing_and_copies_nothing(checkpoint):
    """Neither a collective between devices nor a second copy of the stack."""
    ranks = Ranks(8, 1, make_mesh(8))
    seen = set()
    for group in groups_of(checkpoint, ranks):
        held = group[0].held
        if placing._program(group) in seen:
            continue
        seen.add(placing._program(group))
        text = placing.lowered(group, ranks).compile().as_text()
        for exchange in ("all-gather", "all-reduce", "all-to-all", "collective", "reduce-scatter"):
            assert exchange not in text, (held.array.path, exchange)
        assert "input_output_alias" in text, held.array.path
        # On a CPU an int4 array would be widened as a whole for each piece.
        assert "s4[" not in text, held.array.path


@pytest.mark.parametrize("expert", [1, 8])
def test_each_program_is_compiled_once_and_not_by_who_waits(checkpoint, monkeypatch, expert):
    """What the threads compile is what is then called: nothing is compiled again in the import's thread."""
    monkeypatch.setattr(load, "PIECE_BYTES", SMALL_PIECE)
    ranks = ONE_DEVICE if expert == 1 else Ranks(expert, 1, make_mesh(expert))
    jax.clear_caches()
    placing._writer.cache_clear()
    compiled = []

    def heard(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(threading.current_thread() is threading.main_thread())

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        load.load_base(checkpoint, ranks=ranks)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    values = {h.shape for h in held_arrays(checkpoint, ranks) if h.array.leaf == "values"}
    assert compiled.count(True) == 1 + len(
        values
    )  # the empty arrays, and int4 out of words at the end
    # Arrays that are alike in everything share a program.
    assert compiled.count(False) == len({placing._program(g) for g in groups_of(checkpoint, ranks)})


def test_pieces_land_where_they_belong(checkpoint):
    """Each piece alone, marked with its number: nothing else is touched."""
    ranks = ONE_DEVICE
    groups = [g for g in groups_of(checkpoint, ranks) if g[0].held.array.leaf == "scale"]
    held = groups[0][0].held
    mine = [g for g in groups if g[0].held is held]
    base = placing.empty_arrays([held])[held.array.path]
    expected = np.zeros((len(held.tensors), held.rows, *held.row_shape), np.float32)
    with placing.Writers(mine, ranks) as writers:
        for number, group in enumerate(mine):
            pieces = [np.full(p.shape, number + 1, held.dtype) for p in group]
            base = writers.write(number, base, [jax.device_put(piece) for piece in pieces])
            for p in group:
                expected[p.layer : p.layer + p.layers, p.row : p.row + p.rows] = number + 1
    assert (np.asarray(base, np.float32) == np.swapaxes(expected, -1, -2)).all()
