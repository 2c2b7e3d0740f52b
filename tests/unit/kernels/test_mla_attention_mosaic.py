"""The Hopper kernels of packed attention in Pallas' interpreter, against the reference in fp32.

The interpreter's warpgroups wait for each other in XLA's threads, of which there have to be more than
warpgroups: conftest's number of CPU devices sees to that, whatever the number of cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from kimi_jax.kernels.mla_attention import mosaic, reference
from kimi_jax.kernels.mla_attention.residuals import LOGSUMEXP_NAME, OUTPUT_NAME
from kimi_jax.kernels.target import compiling_for

# Of two tiles of 128, the last not whole: a segment that crosses them, with tiles of keys and of
# queries that see each other entirely; one of one token; padding in between and at the end.
LENGTHS = [(200, 1), (1, 2), (29, 3), (10, 0), (8, 4), (2, 0)]
SEGMENTS = np.repeat([i for _, i in LENGTHS], [n for n, _ in LENGTHS])[None].astype(np.int32)
HEADS, NOPE, ROPE, VALUE, SCALE, TOLERANCE = 2, 64, 64, 128, 0.1, 6e-3
REAL = SEGMENTS > 0


def with_gradients(function, q, kv, rope_key, d_out):
    out, pullback = jax.vjp(function, q, kv, rope_key)
    return [np.asarray(value, np.float32) for value in (out, *pullback(d_out))]


@pytest.fixture(scope="module")
def results():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((HEADS, NOPE + ROPE), (HEADS, NOPE + VALUE), (ROPE,), (HEADS, VALUE))
    operands = [
        jax.random.normal(key, (*SEGMENTS.shape, *shape), jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    ids = jnp.asarray(SEGMENTS)
    found = with_gradients(lambda *a: mosaic.attention(*a, ids, SCALE, interpret=True), *operands)
    exact = [value.astype(jnp.float32) for value in operands]
    exact[3] = jnp.where(REAL[:, :, None, None], exact[3], 0)  # nothing flows back from padding
    wanted = with_gradients(lambda *a: reference.attention(*a, ids, SCALE), *exact)
    return found, wanted


@pytest.mark.parametrize("part", range(4), ids=["out", "dq", "dkv", "drope"])
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


def operands_of(dtype=jnp.bfloat16, nope=128, rope=64, value=128):
    shapes = ((1, nope + rope), (1, nope + value), (rope,))
    arrays = [jax.ShapeDtypeStruct((1, 128, *shape), dtype) for shape in shapes]
    return *arrays, jax.ShapeDtypeStruct((1, 128), jnp.int32)


@pytest.mark.parametrize(
    "change",
    [{"dtype": jnp.float32}, {"nope": 96}, {"rope": 32}, {"nope": 64, "value": 192}],
    ids=["fp32", "odd width", "odd rope", "wider values"],
)
def test_refusals(change):
    """Named, it raises; `auto` takes the reference instead."""

    def attend(impl):
        return lambda *operands: api.latent_attention(*operands, SCALE, impl=impl)

    with pytest.raises(UserError, match="required"):
        jax.eval_shape(attend("pallas"), *operands_of(**change))
    with compiling_for("NVIDIA H200"):
        jax.eval_shape(attend("auto"), *operands_of(**change))


def test_auto_is_pallas_on_hopper():
    def attend(*operands):
        return api.latent_attention(*operands, SCALE)

    operands, name = operands_of(), "packed_attention_forward"
    with compiling_for("NVIDIA H200"):
        assert name in str(jax.make_jaxpr(attend)(*operands))
    assert name not in str(jax.make_jaxpr(lambda *a: attend(*a))(*operands))


def kernel_names(jaxpr):
    """Of all kernels that a jaxpr runs."""
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name"))
        if name.startswith("packed_attention"):
            yield name
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from kernel_names(inner)


@pytest.mark.parametrize(("names", "kernels"), [((OUTPUT_NAME, LOGSUMEXP_NAME), 1), ((), 2)])
def test_saved_names_spare_the_forward_kernel(names, kernels):
    """Under recomputation, the forward kernel runs again unless what it gave is kept."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    @partial(jax.checkpoint, policy=policy)
    def attend(*operands):
        return api.latent_attention(*operands, SCALE, impl="pallas")

    def total(*operands):
        return (attend(*operands).astype(jnp.float32) ** 2).sum()

    gradient = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*operands_of())
    assert list(kernel_names(gradient.jaxpr)).count("packed_attention_forward") == kernels
