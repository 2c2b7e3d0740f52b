"""Head and cross-entropy in bf16 at K2's width against fp32, on a GPU.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`.
"""

import jax
import jax.numpy as jnp

from kimi_jax.kernels.linear_cross_entropy import fused, reference
from kimi_jax.kernels.types import LinearAdapter
from tests.device import needs

pytestmark = needs.a_hopper_gpu

TOKENS, WIDTH, VOCABULARY, RANK, SCALE, TOLERANCE = 700, 7168, 163840, 8, 2.0, 6e-3


def relative_error(found, wanted):
    found = found.astype(jnp.float32)
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def test_loss_and_gradients():
    """Loss and gradients, the head adapted; the last chunk is not full."""
    keys = jax.random.split(jax.random.key(0), 6)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH), jnp.bfloat16)
    head = jax.random.normal(keys[1], (VOCABULARY, WIDTH), jnp.bfloat16) * WIDTH**-0.5
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCABULARY, jnp.int32)
    weights = jax.random.uniform(keys[3], (TOKENS,))
    a = jax.random.normal(keys[4], (RANK, WIDTH)) * WIDTH**-0.5
    b = jax.random.normal(keys[5], (VOCABULARY, RANK)) * 0.1

    def value_and_gradients(module, hidden, head, a, b):
        def loss(hidden, a, b):
            adapter = LinearAdapter(a, b, SCALE)
            return module.linear_cross_entropy(hidden, head, targets, weights, adapter, 256)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, a, b)

    function = jax.jit(value_and_gradients, static_argnums=0)
    loss, gradients = function(fused, hidden, head, a, b)
    with jax.default_matmul_precision("highest"):
        exact = hidden.astype(jnp.float32), head.astype(jnp.float32), a, b
        wanted, wanted_gradients = function(reference, *exact)
    assert abs(float(loss / wanted) - 1) < 1e-4
    for name, value, want in zip(("hidden", "a", "b"), gradients, wanted_gradients, strict=True):
        assert (error := relative_error(value, want)) <= TOLERANCE, (name, error)
