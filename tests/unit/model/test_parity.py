"""The model against transformers and peft, in fp32: goldens described in tests/parity/README.md."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.lora import init_adapters
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.transformer import ModelDef
from kimi_jax.training.loss import loss_terms
from tests.unit import golden

FP32 = ModelSettings(dtype=jnp.float32)


@pytest.fixture(scope="module", params=golden.CHECKPOINTS)
def name(request):
    return request.param


def base_logits(name, tokens, positions, segments=None, settings=FP32):
    """Of the base alone, through the public call."""
    model = ModelDef(golden.checkpoint(name).config, settings=settings).bind(golden.base(name), {})
    return model(tokens, positions, segments)


def loss_and_gradients(name, recompute, quickly):
    """Mean loss and its gradients with respect to the stored adapter, on the stored batch."""
    stored = golden.gradients(name)
    settings = FP32._replace(recompute=recompute)
    model_def = ModelDef(golden.checkpoint(name).config, golden.plan(name), settings)
    positions, segments = golden.places(stored["tokens"])
    batch = {
        "tokens": jnp.asarray(stored["tokens"]),
        "loss_weights": jnp.asarray(stored["loss_weights"]),
        "positions": positions,
        "segment_ids": segments,
    }

    def mean_loss(adapter, base, batch):
        # 16 divides no row: chunks cross rows, and the last one is padded.
        terms = loss_terms(model_def.bind(base, adapter), batch, chunk=16)
        return terms.loss_sum / terms.weight_sum

    arguments = (golden.adapter(name), golden.base(name), batch)
    return quickly(jax.value_and_grad(mean_loss), *arguments)(*arguments)


@pytest.fixture(scope="module")
def differentiate(quickly):
    """`loss_and_gradients`, computed once for each pair of arguments."""
    return cache(lambda name, recompute: loss_and_gradients(name, recompute, quickly))


@pytest.fixture(scope="module")
def differentiated(name, differentiate):
    return differentiate(name, "layer")


def relative_error(found, expected):
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_logits(name):
    stored = golden.logits(name)
    found = base_logits(name, stored["tokens"], stored["positions"])
    assert found.dtype == jnp.float32
    assert np.abs(found - stored["logits"]).max() <= 1e-4


def test_logits_far_beyond_the_original_context(name):
    """YaRN's slowed frequencies and jumping positions."""
    stored = golden.logits(name)
    assert stored["far_positions"].max() > 1000
    found = base_logits(name, stored["far_tokens"], stored["far_positions"])
    assert np.abs(found - stored["far_logits"]).max() <= 1e-4


def test_loss(name, differentiated):
    assert float(differentiated[0]) == pytest.approx(
        float(golden.gradients(name)["loss"]), rel=1e-5
    )


def test_gradients_of_every_target(name, differentiated):
    """Each factor of each linear layer, stacked over its layers and experts."""
    expected = golden.adapter_gradients(name)
    found = differentiated[1]
    assert found.keys() == expected.keys()
    errors = {path: relative_error(found[path], expected[path]) for path in expected}
    assert {path: error for path, error in errors.items() if not error <= 1e-4} == {}


def test_gradients_of_every_expert_and_layer(name, differentiated):
    """A mean over a stack could hide one layer or expert whose gradient went to another."""
    for path, expected in golden.adapter_gradients(name).items():
        found = np.asarray(differentiated[1][path])
        each = np.abs(found - expected).max(axis=(-1, -2))
        largest = np.abs(expected).max()
        assert (each <= 1e-3 * largest).all(), path


def test_recomputation_changes_nothing(differentiate):
    """The backward pass sees the layers, and the experts, that the forward pass saw."""
    kept, recomputed = (differentiate("k2_thinking", recompute) for recompute in ("none", "layer"))
    assert float(kept[0]) == pytest.approx(float(recomputed[0]), rel=1e-6)
    for path, gradient in kept[1].items():
        assert relative_error(recomputed[1][path], gradient) <= 1e-6, path


@pytest.fixture
def ordinary_compiler():
    """Other tests of this process may compile, or have compiled, the same function without optimisation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
def test_new_adapter_changes_no_bit(dtype, ordinary_compiler):
    """With B = 0 the model is its base, under the ordinary compiler."""
    name = "k2_thinking"
    settings = ModelSettings(dtype=dtype)
    stored = golden.logits(name)
    alone = base_logits(name, stored["tokens"], stored["positions"], settings=settings)
    plan = golden.plan(name)
    model = ModelDef(golden.checkpoint(name).config, plan, settings)
    adapted = model.bind(golden.base(name), init_adapters(plan, seed=0))
    found = adapted(jnp.asarray(stored["tokens"]), jnp.asarray(stored["positions"]))
    assert np.asarray(found).tobytes() == np.asarray(alone).tobytes()


def test_decoding_with_a_cache(quickly):
    """Prefill, then token by token, with every projection adapted: the logits of the full forward pass.

    An adapted kv_b_proj is absorbed here, and expanded there; the golden is a third computation.
    """
    name = "k2_thinking"
    stored = golden.gradients(name)
    tokens = jnp.asarray(stored["tokens"])
    positions, _ = golden.places(tokens)
    length, prefilled = tokens.shape[1], 13
    model_def = ModelDef(golden.checkpoint(name).config, golden.plan(name), FP32)
    trees = golden.base(name), golden.adapter(name)

    def advance(base, adapter, tokens, positions, caches):
        model = model_def.bind(base, adapter)
        hidden, caches = model.decode(tokens, positions, caches)
        return model.head_logits(hidden), caches

    # Longer than needed: places that were never written must not be seen.
    caches = model_def.bind(*trees).empty_caches(len(tokens), length + 3)
    first = tokens[:, :prefilled], positions[:, :prefilled]
    out, caches = quickly(advance, *trees, *first, caches)(*trees, *first, caches)
    found = [out]
    step = quickly(advance, *trees, tokens[:, :1], positions[:, :1], caches)
    for at in range(prefilled, length):
        out, caches = step(*trees, tokens[:, at : at + 1], positions[:, at : at + 1], caches)
        found.append(out)
    assert np.abs(np.concatenate(found, axis=1) - stored["logits"]).max() <= 1e-4


def test_packed_documents_are_alone():
    """Documents that share a row give what they give in rows of their own."""
    name = "k2_thinking"
    first, second = golden.logits(name)["tokens"]
    cut = 10
    rest = len(first) - cut
    packed = np.stack([np.concatenate([first[:cut], second[:rest]]), second])
    positions = np.stack([np.concatenate([np.arange(cut), np.arange(rest)]), np.arange(len(first))])
    segments = np.array([[7] * cut + [8] * rest, [1] * len(first)])
    places = positions.astype(np.int32), segments.astype(np.int32)
    together = base_logits(name, packed, *places)
    apart = base_logits(name, np.stack([first, second]), None)
    np.testing.assert_allclose(together[0, :cut], apart[0, :cut], atol=1e-5)
    np.testing.assert_allclose(together[0, cut:], apart[1, :rest], atol=1e-5)
    np.testing.assert_allclose(together[1], apart[1], atol=1e-5)


def test_token_outside_the_vocabulary_is_refused():
    """The lookup would take the nearest row in silence."""
    for token in (-1, 128):
        with pytest.raises(ValueError, match=rf"token id {token} is outside .* 0 to 127"):
            base_logits("k2_thinking", np.array([[1, token]]), None)
