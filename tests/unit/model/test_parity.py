"""The model against transformers and peft, in fp32: goldens described in tests/parity/README.md."""

from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import Keep
from kimi_jax.lora import init_adapters
from kimi_jax.model import kept
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.transformer import ModelDef
from kimi_jax.training.loss import loss_terms
from tests.unit import golden

FP32 = ModelSettings(dtype=jnp.float32)
EVERYTHING = get_args(Keep)


@pytest.fixture(scope="module", params=golden.CHECKPOINTS)
def name(request):
    return request.param


def base_logits(name, tokens, positions, segments=None, settings=FP32):
    """Of the base alone, through the public call."""
    model = ModelDef(golden.checkpoint(name).config, settings=settings).bind(golden.base(name), {})
    return model(tokens, positions, segments)


def loss_and_gradients(name, quickly, **settings):
    """Mean loss and its gradients with respect to the stored adapter, on the stored batch."""
    stored = golden.gradients(name)
    settings = FP32._replace(**settings)
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
    """`loss_and_gradients`, computed once for the same arguments."""
    return cache(lambda name, **settings: loss_and_gradients(name, quickly, **settings))


@pytest.fixture(scope="module")
def differentiated(name, differentiate):
    return differentiate(name, recompute="layer")


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


@pytest.mark.parametrize(
    ("keep", "offload"),
    [((), ()), (EVERYTHING, ()), ((), EVERYTHING), (EVERYTHING[::2], EVERYTHING[1::2])],
    ids=["nothing", "everything", "everything in the host's memory", "half here, half there"],
)
def test_what_is_computed_again_changes_nothing(differentiate, keep, offload):
    """The backward pass sees the layers, and the experts, that the forward pass saw."""
    known = differentiate("k2_thinking", recompute="none")
    found = differentiate("k2_thinking", recompute="layer", keep=keep, offload=offload)
    assert float(found[0]) == pytest.approx(float(known[0]), rel=1e-6)
    for path, gradient in known[1].items():
        assert relative_error(found[1][path], gradient) <= 1e-6, path


def backward_program(**settings):
    """The text of a gradient's program, nothing compiled."""
    model, plan = golden.checkpoint("k2_thinking").config, golden.plan("k2_thinking")
    model_def = ModelDef(model, plan, FP32._replace(**settings))
    places = jnp.zeros((1, 8), jnp.int32)

    def last(adapters, base):
        return model_def.bind(base, adapters).hidden(places, places, places)[0].sum()

    return str(jax.make_jaxpr(jax.grad(last))(model_def.adapter_shapes, model_def.base_shapes))


@pytest.mark.parametrize("name", sorted({*EVERYTHING} - {"attention"}))
def test_what_a_name_spares(name):
    """On CPUs no number would show it, nor what kind of memory holds it. Attention is fast kernels' own."""
    nothing, here = backward_program(), backward_program(keep=(name,))
    there = backward_program(offload=(name,))
    assert here.count("dot_general[") < nothing.count("dot_general[")
    assert there.count("dot_general[") == here.count("dot_general[")
    assert here.count("device_put[") == nothing.count("device_put[")
    # Out of the scan over layers and into it: at least one result of one stack.
    assert there.count("device_put[") >= here.count("device_put[") + 2


def test_norms_are_not_summed_again():
    """The backward pass has each token's mean square."""
    definition = ModelDef(golden.checkpoint("k2_thinking").config, settings=FP32)
    norm = definition.bind(golden.base("k2_thinking"), {}).norm

    def sums(policy):
        def total(x):
            return jax.checkpoint(norm.__call__, policy=policy)(x).sum()

        x = jnp.ones((2, definition.config.hidden_size))
        return str(jax.make_jaxpr(jax.grad(total))(x)).count("reduce_sum")

    assert sums(kept.policy(())) == sums(jax.checkpoint_policies.nothing_saveable) - 1


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
