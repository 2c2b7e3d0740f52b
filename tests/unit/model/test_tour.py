"""A tour shows what the model itself does: its scores, choices, loads and residual streams."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kimi_jax.errors import UserError
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.tour import tour
from kimi_jax.model.transformer import ModelDef
from tests.unit import golden

TOKENS = np.random.default_rng(0).integers(0, 100, (2, 12)).astype(np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(5), *range(7)], [*range(9), *range(3)]], np.int32)


@pytest.fixture(scope="module", params=["k2_thinking", "moonlight"])
def toured(request):
    """With queries through a latent and without, packed experts and not; adapted, packed rows."""
    name = request.param
    settings = ModelSettings(jnp.float32, recompute="none")
    model_def = ModelDef(golden.checkpoint(name).config, golden.plan(name), settings)
    model = model_def.bind(golden.base(name), golden.adapter(name))
    return model, tour(model, TOKENS, POSITIONS, SEGMENTS)


def test_last_residual_gives_the_logits(toured):
    """Guards a tour that walks layers in another order or leaves one out."""
    model, views = toured
    assert len(views) == model.config.num_hidden_layers
    logits = model.head_logits(model.norm(views[-1].residual))
    expected = model(TOKENS, POSITIONS, SEGMENTS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_scores_and_scale_give_the_layers_attention(toured):
    """Guards scores that are not those which the layer attends with: rotation, mask, scale, adapter."""
    model, views = toured
    config, layer = model.config, first_layer(model.dense_layers)
    attention = layer.self_attn
    embedded = model.embed_tokens[...][TOKENS].astype(jnp.float32)
    normed = layer.input_layernorm(embedded)
    heads = attention.kv_b_proj(views[0].latent)
    heads = heads.reshape(*TOKENS.shape, config.num_attention_heads, -1)
    values = heads[..., config.qk_nope_head_dim :]
    p = jax.nn.softmax(views[0].scores * config.softmax_scale, axis=-1)
    out = attention.o_proj(jnp.einsum("bnts,bsnu->btnu", p, values).reshape(*TOKENS.shape, -1))
    expected = attention(normed, jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
    counted = SEGMENTS > 0
    np.testing.assert_allclose(out[counted], expected[counted], atol=1e-5)
    # Another segment, and what comes later, is not seen.
    assert np.isneginf(views[0].scores[0, :, 5:, :5]).all()
    assert np.isneginf(views[0].scores[0, :, 2, 3:]).all()


def test_choices_are_what_the_loads_count(toured):
    """Guards a router that is asked about another state than the layer's own."""
    model, views = toured
    config = model.config
    for view in views[: config.first_k_dense_replace]:
        assert view.experts.shape[-1] == view.load.size == 0
    for view in views[config.first_k_dense_replace :]:
        chosen = np.asarray(view.experts)[SEGMENTS > 0]
        assert chosen.shape[-1] == config.num_experts_per_tok
        counts = np.bincount(chosen.ravel(), minlength=config.n_routed_experts)
        np.testing.assert_array_equal(view.load, counts)
        np.testing.assert_allclose(view.weights.sum(-1), config.routed_scaling_factor, rtol=1e-5)


def test_ids_outside_the_vocabulary_are_refused(toured):
    with pytest.raises(UserError, match="outside the vocabulary"):
        tour(toured[0], TOKENS + 10**6)


def test_a_model_that_is_spread_over_devices_is_refused(toured, monkeypatch):
    """Guards a tour of one device's part of the weights."""
    spread = toured[0].settings._replace(ranks=SimpleNamespace(mesh="of two devices"))
    monkeypatch.setattr(toured[0], "settings", spread)
    with pytest.raises(UserError, match="spread over several devices"):
        tour(toured[0], TOKENS)


def first_layer(stack):
    """A module with the weights of a stack's first layer."""
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda values: values[0], state))
