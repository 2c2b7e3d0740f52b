"""The Hopper kernels of packed attention in Pallas' interpreter, against the reference in fp32.

The interpreter's warpgroups wait for each other in XLA's threads, of which there have to be more than
warpgroups: conftest's number of CPU devices sees to that, whatever the number of cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from kimi_jax.kernels.mla_attention import mosaic, reference
from kimi_jax.kernels.target import compiling_for

# Of two tiles of 128, the last not whole: a segment that crosses them, with tiles of keys and of
# queries that see each other entirely; one of one token; padding in between and at the end.
LENGTHS = [(200, 1), (1, 2), (29, 3), (10, 0), (8, 4), (2, 0)]
SEGMENTS = np.repeat([i for _, i in LENGTHS], [n for n, _ in LENGTHS])[None].astype(np.int32)
HEADS, WIDTH, VALUE_WIDTH, SCALE, TOLERANCE = 1, 128, 64, 0.1, 6e-3
REAL = SEGMENTS > 0


def with_gradients(function, q, k, v, d_out):
    out, pullback = jax.vjp(function, q, k, v)
    return [np.asarray(value, np.float32) for value in (out, *pullback(d_out))]


@pytest.fixture(scope="module")
def results():
    keys = jax.random.split(jax.random.key(0), 4)
    operands = [
        jax.random.normal(key, (*SEGMENTS.shape, HEADS, width), jnp.bfloat16)
        for key, width in zip(keys, (WIDTH, WIDTH, VALUE_WIDTH, VALUE_WIDTH), strict=True)
    ]
    ids = jnp.asarray(SEGMENTS)
    found = with_gradients(
        lambda q, k, v: mosaic.attention(q, k, v, ids, SCALE, interpret=True), *operands
    )
    exact = [value.astype(jnp.float32) for value in operands]
    exact[3] = jnp.where(REAL[:, :, None, None], exact[3], 0)  # nothing flows back from padding
    wanted = with_gradients(lambda q, k, v: reference.attention(q, k, v, ids, SCALE), *exact)
    return found, wanted


@pytest.mark.parametrize("part", range(4), ids=["out", "dq", "dk", "dv"])
def test_real_tokens(results, part):
    """A tile left out or counted twice, a mask off by one, a scale forgotten: all show here."""
    found, wanted = (values[part][REAL] for values in results)
    assert np.linalg.norm(found - wanted) <= TOLERANCE * np.linalg.norm(wanted)


def test_padding(results):
    """It is finite, and neither gets nor gives a gradient."""
    out, *gradients = results[0]
    assert np.isfinite(out).all()
    for gradient in gradients:
        assert not gradient[~REAL].any()


def test_runs():
    ids = jnp.array([[7, 7, 2, 0, 0, 2, 2]], jnp.int32)
    first, last = mosaic.runs(ids)
    assert first.tolist() == [[0, 0, 2, 3, 4, 5, 5]]
    assert last.tolist() == [[1, 1, 2, 3, 4, 6, 6]]


def operands_of(dtype, key, value):
    q, v = (jax.ShapeDtypeStruct((1, 128, 1, width), dtype) for width in (key, value))
    return q, q, v, jax.ShapeDtypeStruct((1, 128), jnp.int32)


@pytest.mark.parametrize(
    ("dtype", "key", "value"),
    [(jnp.float32, 192, 128), (jnp.bfloat16, 96, 64), (jnp.bfloat16, 64, 128)],
    ids=["fp32", "odd width", "wider values"],
)
def test_refusals(dtype, key, value):
    """Named, it raises; `auto` takes the reference instead."""

    def attend(impl):
        return lambda q, k, v, ids: api.attention(q, k, v, ids, SCALE, impl=impl)

    with pytest.raises(UserError, match="required"):
        jax.eval_shape(attend("pallas"), *operands_of(dtype, key, value))
    with compiling_for("NVIDIA H200"):
        jax.eval_shape(attend("auto"), *operands_of(dtype, key, value))


def test_auto_is_pallas_on_hopper():
    def attend(q, k, v, ids):
        return api.attention(q, k, v, ids, SCALE)

    operands = operands_of(jnp.bfloat16, 192, 128)
    name = "packed_attention_forward"
    with compiling_for("NVIDIA H200"):
        assert name in str(jax.make_jaxpr(attend)(*operands))
    assert name not in str(jax.make_jaxpr(lambda *a: attend(*a))(*operands))
