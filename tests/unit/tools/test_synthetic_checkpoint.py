"""The checkpoint that imports are measured with: K2-Thinking's layout, and sizes as asked for."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from kimi_jax.model.config import parse_model_config
from kimi_jax.model.params import weight_table
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.load import load_base

PATH = Path(__file__).parents[3] / "tools" / "synthetic_checkpoint.py"
GIB = 2**30


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("synthetic_checkpoint", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size(config):
    return sum(weight.bytes for weight in weight_table(parse_model_config(config)))


def test_the_whole_size_is_the_release(tool):
    true = json.loads(tool.CONFIG.read_text(encoding="utf-8"))
    config = tool.sized_config(553.3)
    assert config == true
    shapes = 60 * 384 * 3 * 8  # int32 pairs that files hold, and memory does not
    assert size(config) + shapes == 594_205_904_896


@pytest.mark.parametrize("gib", [12, 30, 32, 100])
def test_large_ones_have_true_widths(tool, gib):
    config = tool.sized_config(gib)
    assert config["hidden_size"] == 7168
    assert config["n_routed_experts"] % 16 == 0
    assert gib * GIB <= size(config) <= 1.15 * gib * GIB


def test_a_small_one_can_be_imported(tool, tmp_path):
    written = tool.write_checkpoint(tmp_path, tool.sized_config(0.03))
    checkpoint = open_checkpoint(tmp_path)
    assert written == sum(entry.nbytes for entry in checkpoint.entries.values())
    base = load_base(checkpoint)
    for path in ("embed_tokens", "moe_layers.mlp.gate.e_score_correction_bias"):
        assert np.isfinite(np.asarray(base[path], np.float32)).all()
