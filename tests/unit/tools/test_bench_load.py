"""The import's bench on a tiny checkpoint: every figure that it promises is there, and they add up."""

import json

import pytest

from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks
from kimi_jax.weights import load
from kimi_jax.weights.checkpoint import open_checkpoint
from tests.unit.support import write_tiny_checkpoint
from tools.load_bench import measuring, raw
from tools.load_bench.imports import timed_blocks


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "checkpoint"
    write_tiny_checkpoint(directory, n_routed_experts=16)
    return directory


@pytest.mark.parametrize("expert", [1, 4])
def test_every_figure_is_there(directory, monkeypatch, expert):
    monkeypatch.setattr(raw, "THREADS", (1, 2))
    monkeypatch.setattr(raw, "BLOCKS_MIB", (1,))
    monkeypatch.setattr(raw, "ONE", (2, 1))
    ranks = ONE_DEVICE if expert == 1 else Ranks(expert, 1, make_mesh(expert))
    lines, result = [], {}
    measuring.measure(directory, ranks, lines.append, result, reasons=True)
    assert len(lines) == 3
    json.dumps(result)
    assert result["devices"] == f"{expert} × cpu"
    for pages in measuring.PAGES:
        found = result[pages]
        assert found["import_gb_s"] >= 0
        assert len(found["raw_gb_s"]) == (1 if pages == "cold" else 2)
        assert found["beyond_baseline"].keys() >= {"process_gb", "system_gb"}
    assert result["reasons"]["parts"].keys() == {"read", "read and sent", "placed"}
    steps = dict(result["reasons"]["steps"])
    every = steps.pop("all")
    assert sum(steps.values()) == pytest.approx(every, abs=0.001 * len(steps))  # each is rounded
    assert min(steps.values()) >= 0
    assert steps["send"] > 0
    assert steps["write"] > 0


def test_blocks_are_the_files(directory, monkeypatch):
    """Nothing is left out and nothing sent twice, so that the rate is one of these bytes."""
    monkeypatch.setattr(load, "PIECE_BYTES", 3_000)
    files = sorted({entry.file for entry in open_checkpoint(directory).entries.values()})
    sent, real = [], load.copy_to

    def copy(view, device):
        sent.append(view.tobytes())
        return real(view, device)

    monkeypatch.setattr(load, "copy_to", copy)
    assert timed_blocks(files) > 0
    blocks = [
        path.read_bytes()[begin : begin + 3_000]
        for path in files
        for begin in range(0, path.stat().st_size, 3_000)
    ]
    assert sorted(sent) == sorted(blocks)


def test_settings_are_the_imports(monkeypatch):
    for name in measuring.TUNED:
        monkeypatch.setattr(load, name, getattr(load, name))
    measuring.use("5,4,3,2,1")
    found = [getattr(load, name) for name in measuring.TUNED]
    assert found == [5, 4, 3 << 20, 2 << 20, 1]
