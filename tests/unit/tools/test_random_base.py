"""Random base weights: which of them are made smaller, and by how much."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from kimi_jax.model.config import parse_model_config
from kimi_jax.model.transformer import ModelDef
from tests.unit.support import tiny_config
from tools import random_base


def test_what_is_added_to_the_residual_stream_is_smaller(monkeypatch):
    """By √(2 · layers), packed or not; nothing else is."""
    model = ModelDef(parse_model_config(tiny_config(num_hidden_layers=8)), {})
    monkeypatch.setattr(random_base, "_made", lambda array, ranks, seed, size: size)
    sizes = random_base.random_base(model)
    small = {path for path, size in sizes.items() if size != 1}
    assert {sizes[path] for path in small} == {0.25}
    assert small == {
        "dense_layers.mlp.down_proj.weight",
        "dense_layers.self_attn.o_proj.weight",
        "moe_layers.mlp.experts.down_proj.scale",
        "moe_layers.mlp.experts.down_proj.values",
        "moe_layers.mlp.shared_experts.down_proj.weight",
        "moe_layers.self_attn.o_proj.weight",
    }


def test_codes_have_no_mean():
    """A mean of half a code makes every product's values move together, and all tokens alike."""
    weight = SimpleNamespace(role="routed")
    array = SimpleNamespace(leaf="values", weight=weight)
    codes = np.asarray(random_base._slice(array, jax.random.key(0), (200, 500), 1.0), np.float64)
    assert abs(codes.mean()) < 4 * random_base.CODE_DEVIATION / codes.size**0.5
    assert codes.std() == pytest.approx(random_base.CODE_DEVIATION, rel=0.01)
