"""Linear layers with adapters in bf16 at K2's widths against fp32, on a GPU.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`.
"""

import jax
import jax.numpy as jnp
import pytest

from kimi_jax.kernels import api
from kimi_jax.kernels.types import LinearAdapter
from tests.device import needs

pytestmark = needs.a_hopper_gpu

TOKENS, RANK, SCALE, TOLERANCE = 6144, 8, 2.0, 6e-3
LAYERS = {  # input, outputs
    "q_a and kv_a": (7168, (1536, 576)),
    "q_b": (1536, (12288,)),
    "kv_b": (512, (16384,)),
    "o": (8192, (7168,)),
    "shared gate and up": (7168, (2048, 2048)),
    "shared down": (2048, (7168,)),
}


def operands(layer, b_of=0.1):
    width, outs = LAYERS[layer]
    keys = iter(jax.random.split(jax.random.key(0), 12))
    normal = lambda shape, dtype=jnp.bfloat16: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
    x = normal((TOKENS, width))
    weights = tuple(width**-0.5 * normal((out, width)) for out in outs)
    factors = tuple(
        (width**-0.5 * normal((RANK, width), jnp.float32), b_of * normal((out, RANK), jnp.float32))
        for out in outs
    )
    return x, weights, factors, tuple(normal((TOKENS, out)) for out in outs)


def both_ways(impl, dtype):
    def run(x, weights, factors, dys):
        weights = tuple(weight.astype(dtype) for weight in weights)

        def forward(x, factors):
            adapters = tuple(LinearAdapter(*pair, SCALE) for pair in factors)
            return api.linear(x.astype(dtype), weights, adapters, impl)

        ys, pull_back = jax.vjp(forward, x, factors)
        return ys, *pull_back(tuple(dy.astype(dtype) for dy in dys))

    return jax.jit(run)


@pytest.mark.parametrize("layer", LAYERS)
def test_products_and_gradients(layer):
    """Against the reference in fp32: bf16 operands and two or three roundings."""
    given = operands(layer)
    with jax.default_matmul_precision("highest"):
        wanted = both_ways("reference", jnp.float32)(*given)
    found = both_ways("joined", jnp.bfloat16)(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < TOLERANCE


@pytest.mark.parametrize("layer", LAYERS)
def test_a_new_adapter_changes_no_bit(layer):
    x, weights, factors, _ = operands(layer, b_of=0)

    @jax.jit
    def adapted(x, weights, factors):
        adapters = tuple(LinearAdapter(*pair, SCALE) for pair in factors)
        return api.linear(x, weights, adapters)

    plain = jax.jit(lambda x, weights: api.linear(x, weights, (None,) * len(weights)))
    for one, other in zip(adapted(x, weights, factors), plain(x, weights), strict=True):
        assert (one == other).all()
