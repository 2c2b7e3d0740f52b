"""The Hopper attention implementations against fp32, on a GPU.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels.mla_attention import cudnn, mosaic, reference
from tests.device import needs

pytestmark = needs.a_hopper_gpu

HEADS, NOPE, ROPE, VALUE, SCALE, TOLERANCE = 4, 128, 64, 128, 0.1, 6e-3
# Lengths of segments, those of padding negative; the rest of a row is padding. As few shapes as
# possible, because most of the time is spent compiling.
LENGTH = 1024
ROWS = {
    "one segment": [[1024], [1024]],
    "one segment and padding": [[700], [1]],
    "ends at tiles": [[128, 256, 640], [512, 512]],
    "ends anywhere": [[1, 63, 65, 127, 1, 300, 467], [1000, 24]],
    "many short": [[8] * 128, [3] * 341],
    "padding between": [[100, -50, 874], []],
    "not whole tiles": [[333, 200], [533]],
}
ONE_SEGMENT = ("one segment", "one segment and padding")
CASES = [("cudnn", name) for name in ONE_SEGMENT] + [("pallas", name) for name in ROWS]
IMPLEMENTATIONS = {
    "cudnn": cudnn.attention,
    "cudnn, same bits": partial(cudnn.attention, deterministic=True),
    "pallas": mosaic.attention,
    "reference": reference.attention,
}


def segment_ids(rows):
    """Of lengths."""
    length = LENGTH if rows != ROWS["not whole tiles"] else 533
    ids = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        start = 0
        for number, size in enumerate(lengths, start=1):
            row[start : start + abs(size)] = number if size > 0 else 0
            start += abs(size)
    return ids


def operands(ids, heads=HEADS):
    """Queries, keys beside values, the shared key, and the gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((heads, NOPE + ROPE), (heads, NOPE + VALUE), (ROPE,), (heads, VALUE))
    return [
        jax.random.normal(key, (*ids.shape, *shape), jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


@partial(jax.jit, static_argnums=0)
def with_gradients(name, q, kv, rope_key, d_out, ids):
    function = IMPLEMENTATIONS[name]
    out, pullback = jax.vjp(lambda *a: function(*a, ids, SCALE), q, kv, rope_key)
    return out, *pullback(d_out)


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_output_and_gradients(name, rows):
    """Output and gradients at real tokens; padding is finite and gets and gives no gradient."""
    compare(name, segment_ids(ROWS[rows]), HEADS)


def compare(name, ids, heads):
    values = operands(ids, heads)
    found = with_gradients(name, *values, jnp.asarray(ids))
    exact = [v.astype(jnp.float32) for v in values]
    exact[3] = jnp.where(jnp.asarray(ids > 0)[:, :, None, None], exact[3], 0)
    with jax.default_matmul_precision("highest"):
        wanted = with_gradients("reference", *exact, jnp.asarray(ids))
    for part, value, want in zip(("out", "dq", "dkv", "drope"), found, wanted, strict=True):
        real = jnp.asarray(ids > 0).reshape(*ids.shape, *[1] * (value.ndim - 2))
        assert bool(jnp.isfinite(value).all()), f"{part} is not finite"
        difference = jnp.where(real, value.astype(jnp.float32) - want, 0)
        error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(jnp.where(real, want, 0)))
        assert error <= TOLERANCE, (part, error)
        if part != "out":
            assert not bool(jnp.where(real, 0, value).any()), f"{part} of padding"


@pytest.mark.parametrize("name", ["cudnn, same bits", "pallas"])
def test_same_bits(name):
    """Twice the same bits: sums have a fixed order."""
    ids = jnp.ones((2, LENGTH), jnp.int32)
    values = operands(ids)
    first, second = (with_gradients(name, *values, ids) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert bool((a == b).all())
