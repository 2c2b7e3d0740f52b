"""Rotary positions against complex numbers, and in one pass over whole queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.model.config import parse_model_config
from kimi_jax.model.rope import frequencies, rotate
from tests.unit.support import tiny_config

NOPE, POSITIONS = 6, np.array([[0, 1, 5], [2, 0, 300]], np.int32)


@pytest.fixture(scope="module")
def config():
    return parse_model_config(tiny_config())


def draw(width, dtype=np.float32):
    values = np.random.default_rng(0).normal(size=(*POSITIONS.shape, 2, width))
    return jnp.asarray(values, dtype)


def test_pairs_turn(config):
    """A pair is a complex number; a frequency on the wrong pair or a wrong sign shows here."""
    x = draw(config.qk_rope_head_dim)
    turned = np.asarray(x[..., 0::2] + 1j * x[..., 1::2])
    turned = turned * np.exp(1j * POSITIONS[..., None] * frequencies(config))[:, :, None]
    found = np.asarray(rotate(x, jnp.asarray(POSITIONS), config))
    np.testing.assert_allclose(found[..., 0::2], turned.real, atol=2e-5)
    np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=2e-5)


def test_columns_before_stay(config):
    whole = draw(NOPE + config.qk_rope_head_dim, jnp.bfloat16)
    found = rotate(whole, jnp.asarray(POSITIONS), config)
    last = rotate(whole[..., NOPE:], jnp.asarray(POSITIONS), config)
    assert (found[..., :NOPE] == whole[..., :NOPE]).all()
    assert (found[..., NOPE:] == last).all()


def test_gradient_is_rounded_once(config):
    """bf16 terms added in bf16 would lose a digit of the queries' gradient."""
    whole = draw(NOPE + config.qk_rope_head_dim, jnp.bfloat16)

    def back(cotangent):
        return jax.vjp(lambda x: rotate(x, jnp.asarray(POSITIONS), config), cotangent)[1](cotangent)

    exact = back(whole.astype(jnp.float32))[0]
    assert (back(whole)[0] == exact.astype(jnp.bfloat16)).all()
