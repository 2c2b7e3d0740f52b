"""Decoding with the latent cache against the model without one, and how tokens are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import UserError
from kimi_jax.model.decode import Sampling, generate, nucleus
from tests.unit.support import END, POSITIONS, VOCAB
from tests.unit.training.conftest import greedy

NEW = 8  # as in `greedy`: another number is another program
UNREACHED = (-1,)  # no token ends a continuation
LENGTHS = (5, 17, 11)


def prompts(seed=4):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).astype(np.int32) for length in LENGTHS]


def draw(parts, sampling, stop=UNREACHED, given=None):
    return generate(
        parts.model_def, parts.base, parts.state.adapters, given or prompts(), NEW, sampling, stop
    )


def uncached_logits(parts, prompt, continuation):
    """Logits before each token of a continuation, from one pass over the whole text."""
    tokens = np.zeros((3, 32), np.int32)  # one shape for all, so that it is compiled once
    whole = np.concatenate([prompt, continuation])
    tokens[0, : len(whole)] = whole
    logits = np.asarray(parts.model(tokens))[0]
    return logits[len(prompt) - 1 : len(whole) - 1]


def numpy_nucleus(logits, top_p):
    """The likeliest tokens whose probabilities first reach top_p, one row after the other."""
    kept = np.full_like(logits, -np.inf)
    for row, values in enumerate(logits):
        p = np.exp(values - values.max(), dtype=np.float64)
        p /= p.sum()
        total = 0.0
        for token in np.argsort(-values, kind="stable"):
            if total >= top_p:
                break
            kept[row, token] = values[token]
            total += p[token]
    return kept


def test_greedy_tokens_are_those_without_a_cache(noisy):
    """Guards the cache: positions, masks, padding of prompts, adapters in decoding."""
    for prompt, continuation in zip(prompts(), greedy(noisy, prompts(), UNREACHED), strict=True):
        assert continuation.dtype == np.int32
        assert len(continuation) == NEW
        logits = uncached_logits(noisy, prompt, continuation)
        np.testing.assert_array_equal(continuation, logits.argmax(-1))


def test_a_prompts_answer_does_not_depend_on_its_neighbours(noisy):
    """Guards batched prompts of different lengths: each is answered as if it were alone."""
    together = greedy(noisy, prompts(), UNREACHED)
    reordered = greedy(noisy, prompts()[::-1], UNREACHED)[::-1]
    for prompt, one, other in zip(prompts(), together, reordered, strict=True):
        np.testing.assert_array_equal(one, other)
        alone = greedy(noisy, [prompt], UNREACHED)[0]
        np.testing.assert_array_equal(one, alone)


def test_a_continuation_stops_at_an_end_token(noisy):
    """Guards rows that end at different places: each ends with its own end token and no later."""
    free = greedy(noisy, prompts(), UNREACHED)
    for stop in (free[0][2], free[1][0], free[2][NEW - 1]):
        for found, whole in zip(greedy(noisy, prompts(), (int(stop),)), free, strict=True):
            places = np.flatnonzero(whole == stop)
            length = places[0] + 1 if places.size else NEW
            np.testing.assert_array_equal(found, whole[:length])


def test_the_same_seed_draws_the_same_tokens(noisy):
    first = draw(noisy, Sampling(1.0, 0.9, seed=1))
    for one, other in zip(draw(noisy, Sampling(1.0, 0.9, seed=1)), first, strict=True):
        np.testing.assert_array_equal(one, other)
    others = draw(noisy, Sampling(1.0, 0.9, seed=2))
    assert any((one != other).any() for one, other in zip(others, first, strict=True))
    assert len({tuple(row) for row in first}) == len(first)  # rows draw for themselves


def test_a_low_temperature_or_a_small_nucleus_is_greedy(noisy):
    expected = greedy(noisy, prompts(), UNREACHED)
    for sampling in (Sampling(1e-4, 1.0), Sampling(1.0, 1e-6)):
        for found, required in zip(draw(noisy, sampling), expected, strict=True):
            np.testing.assert_array_equal(found, required)


def test_drawn_tokens_lie_in_the_nucleus(noisy):
    """Guards temperature applied after the cut instead of before it."""
    temperature, top_p = 1.5, 0.3
    outside = 0
    for prompt, drawn in zip(prompts(), draw(noisy, Sampling(temperature, top_p, 7)), strict=True):
        logits = uncached_logits(noisy, prompt, drawn)
        for narrow, wide, token in zip(
            numpy_nucleus(logits, top_p),
            numpy_nucleus(logits / temperature, top_p),
            drawn,
            strict=True,
        ):
            assert np.isfinite(wide[token])
            outside += not np.isfinite(narrow[token])
    assert outside > 0, "every token was in the nucleus of temperature 1: the test shows nothing"


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_numpy_one(top_p):
    logits = np.random.default_rng(2).standard_normal((6, 50)).astype(np.float32) * 3
    found = np.asarray(nucleus(jnp.asarray(logits), jnp.float32(top_p)))
    np.testing.assert_array_equal(found, numpy_nucleus(logits, top_p))


def test_the_whole_nucleus_is_everything():
    logits = np.random.default_rng(3).standard_normal((2, 50)).astype(np.float32)
    found = np.asarray(nucleus(jnp.asarray(logits), jnp.float32(1.0)))
    np.testing.assert_array_equal(found, logits)


def test_tokens_are_drawn_as_often_as_the_nucleus_says():
    """Frequencies of 3,000 draws from a nucleus of three: within five standard deviations."""
    p = np.float32([0.4, 0.3, 0.2, 0.07, 0.03])
    kept = nucleus(jnp.log(p)[None], jnp.float32(0.85))[0]
    drawn = np.asarray(jax.random.categorical(jax.random.key(0), kept, shape=(3000,)))
    shares = np.bincount(drawn, minlength=5) / 3000
    expected = np.array([0.4, 0.3, 0.2, 0, 0]) / 0.9
    assert np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / 3000)
    assert not shares[3:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": []}, "a prompt without a token"),
        ({"given": [np.zeros(0, np.int32)]}, "a prompt without a token"),
        (
            {"given": [np.full(3, VOCAB)]},
            f"token id {VOCAB} is outside the vocabulary; required: 0 to {VOCAB - 1}",
        ),
        ({"given": [np.full(3, -2)]}, "token id -2 is outside the vocabulary"),
        ({"new": 0}, "max_new_tokens is 0; required: at least 1"),
        (
            {"given": [np.zeros(POSITIONS - NEW + 1, np.int32)]},
            f"the longest prompt has {POSITIONS - NEW + 1} tokens, and {NEW} more are asked for; the "
            f"model has {POSITIONS} positions",
        ),
        ({"sampling": Sampling(-0.1)}, "temperature is -0.1; required: 0 or more"),
        ({"sampling": Sampling(float("nan"))}, "temperature is nan; required: 0 or more"),
        ({"sampling": Sampling(1.0, 0.0)}, "top_p is 0.0; required: above 0 and at most 1"),
        ({"sampling": Sampling(1.0, 1.01)}, "top_p is 1.01; required: above 0 and at most 1"),
        ({"sampling": Sampling(1.0, 1.0, -1)}, "seed is -1; required: 0 to "),
        ({"sampling": Sampling(1.0, 1.0, 2**70)}, f"seed is {2**70}; required: 0 to "),
    ],
)
def test_what_cannot_be_continued_is_refused(noisy, changes, message):
    values = {"given": prompts(), "new": NEW, "sampling": Sampling(), **changes}
    with pytest.raises(UserError) as error:
        generate(
            noisy.model_def,
            noisy.base,
            noisy.state.adapters,
            values["given"],
            values["new"],
            values["sampling"],
            (END,),
        )
    assert message in str(error.value)
