"""Two products of the same rows by the Hopper kernels, on a GPU: against fp32, and against two calls.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels import api
from kimi_jax.kernels.grouped_matmul import mosaic
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight
from tests.device import needs

pytestmark = needs.a_hopper_gpu

GROUPS, IN, OUTS = 6, 768, (512, 256)
LAYERS, LAYER = 2, 1
BEYOND = 50  # rows that are of no group
TOLERANCE = 4e-3
SIZES = {
    "not multiples of a tile": [100, 300, 1, 17, 65, 255],
    "empty groups, first and last too": [0, 418, 0, 0, 320, 0],
    "few": [16, 1, 0, 17, 7, 0],
    "none at all": [0, 0, 0, 0, 0, 0],
}
TUNINGS = {
    "many rows": mosaic.MANY_ROWS,
    "some rows": mosaic.SOME_ROWS,
    "few rows": mosaic.FEW_ROWS,
    "by rows": None,
}
FIRST, SECOND = (((GROUPS, 8, IN), (GROUPS, out, 8), 2.0) for out in OUTS)
ADAPTERS = {
    "none": (None, None),
    "of both": (FIRST, SECOND),
    "of the first": (FIRST, None),
    "of the second": (None, SECOND),
    "shared a, odd ranks, other scale": (
        ((21, IN), (GROUPS, OUTS[0], 21), 2.0),
        ((GROUPS, 5, IN), (GROUPS, OUTS[1], 5), 0.75),
    ),
    "as many ranks as fit, shared b": (
        ((GROUPS, 60, IN), (OUTS[0], 60), 0.5),
        ((GROUPS, 4, IN), (OUTS[1], 4), 0.5),
    ),
    "more ranks than fit": (
        ((GROUPS, 64, IN), (GROUPS, OUTS[0], 64), 0.5),
        ((8, IN), (OUTS[1], 8), 0.5),
    ),
}
MANY = "not multiples of a tile"
CASES = (
    [("many rows", adapters, MANY) for adapters in ADAPTERS]
    + [
        ("many rows", adapters, name)
        for adapters in ("none", "of both")
        for name in list(SIZES)[1:]
    ]
    + [(tuning, "of both", MANY) for tuning in list(TUNINGS)[1:]]
    + [("by rows", adapters, "few") for adapters in ("none", "of both", "of the first")]
)


def weight_of(key, *shape):
    """Packed, [..., out, in]."""
    *stack, out, width_in = shape
    codes, scales = jax.random.split(key)
    values = jax.random.randint(codes, shape, -8, 8, jnp.int8)
    scale = jax.random.uniform(scales, (*stack, width_in // 32, out), minval=0.01, maxval=0.1)
    return PackedWeight(values.astype(jnp.int4), scale.astype(jnp.bfloat16))


def rounded(key, shape):
    """fp32 with bf16's values, as the kernels use factors."""
    return jax.random.normal(key, shape, jnp.bfloat16).astype(jnp.float32)


def adapters_of(factors, scales):
    return tuple(f and GroupedAdapter(*f, s) for f, s in zip(factors, scales, strict=True))


def both_passes(function, x, factors, dys):
    ys, pullback = jax.vjp(function, x, factors)
    return ys, pullback(dys)


def assert_close(found, wanted, used):
    """Relative error of each product and gradient, of the rows that count."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(found)]
    of_rows = (*found[0], found[1][0])
    for path, one, other in zip(paths, *map(jax.tree.leaves, (found, wanted)), strict=True):
        if any(one is rows for rows in of_rows):
            one, other = one[:used], other[:used]
        one, other = (v.astype(jnp.float32) for v in (one, other))
        error = jnp.linalg.norm((one - other).ravel())
        assert error <= TOLERANCE * jnp.linalg.norm(other.ravel()), path


@pytest.mark.parametrize(("tuning", "adapters", "sizes"), CASES)
def test_products_and_gradients(tuning, adapters, sizes):
    """A layer of a stack, rows beyond the groups; against the reference in fp32."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shapes, numbers = ADAPTERS[adapters], jnp.array(SIZES[sizes], jnp.int32)
    used, scales = sum(SIZES[sizes]), tuple(s and s[2] for s in shapes)
    stacks = tuple(weight_of(next(keys), LAYERS, GROUPS, out, IN) for out in OUTS)
    x, *dys = (
        jax.random.normal(next(keys), (used + BEYOND, width), jnp.bfloat16) for width in (IN, *OUTS)
    )
    factors = tuple(s and tuple(rounded(next(keys), shape) for shape in s[:2]) for s in shapes)

    def pair(x, factors):
        chosen = adapters_of(factors, scales)
        return mosaic.grouped_matmul_pair(x, stacks, numbers, chosen, LAYER, TUNINGS[tuning])

    def twice(x, factors):
        each = zip(stacks, adapters_of(factors, scales), strict=True)
        return tuple(api.grouped_matmul(x, s, numbers, a, "reference", LAYER) for s, a in each)

    found = jax.jit(partial(both_passes, pair))(x, factors, tuple(dys))
    # The reference counts rows of no group to the last one; zeros there change nothing.
    exact = [v.astype(jnp.float32).at[used:].set(0) for v in (x, *dys)]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(partial(both_passes, twice))(exact[0], factors, tuple(exact[1:]))
    assert_close(found, wanted, used)


ROWS, USED, K2_GROUPS, K2_IN, K2_OUT = 98_304, 65_536, 48, 7168, 2048


@pytest.mark.parametrize("adapted", [True, False], ids=["rank 8", "no adapters"])
def test_k2_shapes(adapted):
    """An expert's gate and up on one of eight GPUs; against two products, by what `auto` chooses."""
    keys = iter(jax.random.split(jax.random.key(1), 12))
    share = np.exp(0.45 * np.random.default_rng(0).normal(size=K2_GROUPS))
    sizes = np.floor(share / share.sum() * USED).astype(np.int32)
    stacks = tuple(weight_of(next(keys), LAYERS, K2_GROUPS, K2_OUT, K2_IN) for _ in range(2))
    x = jax.random.normal(next(keys), (ROWS, K2_IN), jnp.bfloat16)
    dys = tuple(jax.random.normal(next(keys), (ROWS, K2_OUT), jnp.bfloat16) for _ in range(2))
    shapes = (K2_GROUPS, 8, K2_IN), (K2_GROUPS, K2_OUT, 8)
    factors = tuple(
        tuple(rounded(next(keys), shape) / 8 for shape in shapes) if adapted else None
        for _ in range(2)
    )

    def one_call(stacks, sizes, layer, x, factors):
        adapters = adapters_of(factors, (2.0, 2.0))
        return api.grouped_matmul_pair(x, stacks, sizes, adapters, layer=layer)

    def two_calls(stacks, sizes, layer, x, factors):
        each = zip(stacks, adapters_of(factors, (2.0, 2.0)), strict=True)
        return tuple(api.grouped_matmul(x, s, sizes, a, "pallas", layer) for s, a in each)

    def passes(function):
        def run(stacks, sizes, layer, x, factors, dys):
            return both_passes(partial(function, stacks, sizes, layer), x, factors, dys)

        return jax.jit(run)(stacks, jnp.asarray(sizes), jnp.int32(LAYER), x, factors, dys)

    assert_close(passes(one_call), passes(two_calls), int(sizes.sum()))
