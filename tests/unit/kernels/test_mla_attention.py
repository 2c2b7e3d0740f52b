"""Implementations of attention, each against loops in float64."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels import api

HEADS, NOPE, ROPE, VALUE, SCALE = 3, 8, 4, 6, 0.31
SEGMENTS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 3, 3, 3],
        [4, 4, 4, 4, 4, 4, 0, 0, 0],  # padding at the end
        [1, 2, 1, 2, 1, 2, 1, 2, 1],  # not contiguous: still only one's own segment
    ],
    np.int32,
)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((HEADS, NOPE + ROPE), (HEADS, NOPE + VALUE), (ROPE,))
    return [rng.normal(size=(*SEGMENTS.shape, *shape)) for shape in shapes]


def expected_attention(q, kv, rope_key):
    k_nope, v = kv[..., :NOPE], kv[..., NOPE:]
    k = np.concatenate([k_nope, np.stack([rope_key] * HEADS, axis=2)], axis=-1)
    out = np.empty_like(v)
    for row, place, head in np.ndindex(v.shape[:3]):
        seen = [s for s in range(place + 1) if SEGMENTS[row, s] == SEGMENTS[row, place]]
        scores = SCALE * k[row, seen, head] @ q[row, place, head]
        weights = np.exp(scores - scores.max())
        out[row, place, head] = weights @ v[row, seen, head] / weights.sum()
    return out


class AttentionContract:
    """Inherit, and name the implementation in `impl`."""

    impl: ClassVar[str]

    def attend(self, *operands):
        return api.latent_attention(*operands, jnp.asarray(SEGMENTS), SCALE, impl=self.impl)

    @pytest.fixture(scope="class")
    def out_and_gradients(self, quickly):
        operands = [jnp.asarray(value, jnp.float32) for value in draw()]
        shape = (*SEGMENTS.shape, HEADS, VALUE)
        probe = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)

        def total(*operands):
            out = self.attend(*operands)
            return (out * probe).sum(), out

        gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
        gradients, out = quickly(gradient, *operands)(*operands)
        return out, gradients, np.asarray(probe, np.float64)

    def test_output(self, out_and_gradients):
        """A look at the future, at another segment, or a scale applied twice shows here."""
        np.testing.assert_allclose(
            out_and_gradients[0], expected_attention(*draw()), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("operand", range(3), ids=["q", "kv", "rope key"])
    def test_gradients(self, out_and_gradients, operand):
        _, gradients, probe = out_and_gradients
        operands = list(draw())
        direction = np.random.default_rng(3).normal(size=operands[operand].shape)
        step, values = 1e-5, []
        for sign in (1, -1):
            moved = operands.copy()
            moved[operand] = operands[operand] + sign * step * direction
            values.append((expected_attention(*moved) * probe).sum())
        along = (values[0] - values[1]) / (2 * step)
        assert (np.asarray(gradients[operand]) * direction).sum() == pytest.approx(along, rel=1e-4)

    def test_bfloat16(self):
        operands = [jnp.asarray(value, jnp.bfloat16) for value in draw()]
        out = self.attend(*operands)
        assert out.dtype == jnp.bfloat16
        exact = expected_attention(*(np.asarray(value, np.float64) for value in operands))
        np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=2e-2)


class TestReference(AttentionContract):
    impl = "reference"
