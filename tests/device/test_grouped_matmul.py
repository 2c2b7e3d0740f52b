"""The grouped matmul's Hopper kernels against fp32 on dequantised weights, on a GPU.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.int4 import dequantise
from kimi_jax.kernels import api
from kimi_jax.kernels.grouped_matmul import mosaic
from kimi_jax.kernels.grouped_matmul.choice import choose
from kimi_jax.kernels.grouped_matmul.mosaic_body import Tuning
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight
from tests.device import needs

pytestmark = needs.a_hopper_gpu

GROUPS, OUT, IN, SCALE, TOLERANCE = 6, 512, 768, 2.0, 4e-3
SIZES = {
    "not multiples of a tile": [100, 300, 1, 17, 65, 255],
    "empty groups, first and last too": [0, 418, 0, 0, 320, 0],
    "all in one": [0, 0, 738, 0, 0, 0],
    "multiples of tiles": [64, 128, 192, 256, 64, 34],
    "few": [16, 1, 0, 17, 7, 0],
    "few, one with many": [0, 3, 50, 0, 0, 16],
}
ROWS = 738
ADAPTERS = {
    "none": None,
    "per group": ((GROUPS, 8, IN), (GROUPS, OUT, 8)),
    "shared a, odd rank": ((21, IN), (GROUPS, OUT, 21)),
    "shared b, largest rank": ((GROUPS, 64, IN), (OUT, 64)),
}
TUNINGS = {
    "many rows": mosaic.MANY_ROWS,
    "some rows": mosaic.SOME_ROWS,
    "few rows": mosaic.FEW_ROWS,
    "narrow": Tuning(widths=(32, 64), stages=4),
    "by rows": None,
}


def operands(rows, shapes, layers=(), seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    values = jax.random.randint(keys[0], (*layers, GROUPS, OUT, IN), -8, 8, jnp.int8)
    scale = jax.random.uniform(keys[1], (*layers, GROUPS, IN // 32, OUT), minval=0.01, maxval=0.1)
    x = jax.random.normal(keys[2], (rows, IN), jnp.bfloat16)
    dy = jax.random.normal(keys[3], (rows, OUT), jnp.bfloat16)
    factors = (None, None)
    if shapes:
        factors = tuple(jax.random.normal(k, s) for k, s in zip(keys[4:], shapes, strict=True))
    return PackedWeight(values.astype(jnp.int4), scale.astype(jnp.bfloat16)), x, dy, factors


def expected(weight, x, dy, factors, sizes):
    """Product and gradients in float64 on the host, of bf16 factors as the kernels use them."""
    plain = np.asarray(dequantise(*weight).astype(jnp.float32), np.float64)
    x, dy = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x, dy))
    group = np.repeat(np.arange(GROUPS), sizes)
    y, dx = np.zeros((len(x), OUT)), np.zeros((len(x), IN))
    a, b = (
        None if f is None else np.asarray(f.astype(jnp.bfloat16).astype(jnp.float32), np.float64)
        for f in factors
    )
    da, db = (None if f is None else np.zeros(f.shape) for f in (a, b))
    for g in range(GROUPS):
        mine = group == g
        y[mine], dx[mine] = x[mine] @ plain[g].T, dy[mine] @ plain[g]
        if a is not None:
            at, bt = (slice(None) if f.ndim == 2 else g for f in (a, b))
            low, low_dy = SCALE * x[mine] @ a[at].T, SCALE * dy[mine] @ b[bt]
            y[mine] += low @ b[bt].T
            dx[mine] += low_dy @ a[at]
            da[at] += low_dy.T @ x[mine]
            db[bt] += dy[mine].T @ low
    return y, dx, da, db


def relative_error(found, wanted):
    found = np.asarray(jnp.asarray(found, jnp.float32), np.float64)
    assert found.shape == wanted.shape
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30)


@partial(jax.jit, static_argnums=(0,))
def product_and_gradients(tuning, weight, sizes, layer, x, dy, a, b):
    def product(x, a, b):
        adapter = None if a is None else GroupedAdapter(a, b, SCALE)
        return mosaic.grouped_matmul(x, weight, sizes, adapter, layer, tuning)

    y, pullback = jax.vjp(product, x, a, b)
    return y, *pullback(dy)


def check(tuning, shapes, sizes, layers=(), layer=0):
    sizes = np.array(sizes, np.int32)
    weight, x, dy, factors = operands(int(sizes.sum()), shapes, layers)
    found = product_and_gradients(
        tuning, weight, jnp.asarray(sizes), jnp.int32(layer), x, dy, *factors
    )
    one = jax.tree.map(lambda v: v[layer], weight) if layers else weight
    for name, value, wanted in zip(
        ("y", "dx", "da", "db"), found, expected(one, x, dy, factors, sizes), strict=True
    ):
        if wanted is None:
            assert value is None
        else:
            assert (error := relative_error(value, wanted)) <= TOLERANCE, (name, error)


CASES = (
    [("many rows", "none", name) for name in SIZES]
    + [("many rows", adapter, "not multiples of a tile") for adapter in list(ADAPTERS)[1:]]
    + [("many rows", "per group", "empty groups, first and last too")]
    + [("some rows", adapter, "not multiples of a tile") for adapter in ("none", "per group")]
    + [("few rows", "none", name) for name in list(SIZES)[:2]]
    + [("by rows", "none", name) for name in list(SIZES)[-2:]]
    + [("few rows", "per group", "not multiples of a tile"), ("narrow", "none", "all in one")]
)


@pytest.mark.parametrize(("tuning", "adapter", "sizes"), CASES)
def test_product_and_gradients(tuning, adapter, sizes):
    check(TUNINGS[tuning], ADAPTERS[adapter], SIZES[sizes])


def test_layer_of_a_stack():
    """A stacked weight is read at its layer; fails if the layer's offset is lost."""
    check(mosaic.MANY_ROWS, None, SIZES["not multiples of a tile"], layers=(3,), layer=2)


def test_one_row():
    """Fewer rows than any tile, and rows that no copy may write beyond."""
    for tuning in (mosaic.FEW_ROWS, None):
        check(tuning, None, [0, 0, 0, 1, 0, 0], layers=(2,), layer=1)


K2_SHAPES = {"gate and up": (7168, 4096), "down": (2048, 7168)}
K2_ROWS = {"many rows": [700, 0, 33, 350], "few rows": [3, 0, 1, 17]}


@pytest.mark.parametrize("rows", K2_ROWS)
@pytest.mark.parametrize("shape", K2_SHAPES)
def test_k2_shapes(shape, rows):
    """K2's widths, by what `auto` chooses, which must be the packed kernel."""
    width, out = K2_SHAPES[shape]
    sizes = jnp.array(K2_ROWS[rows], jnp.int32)
    keys = jax.random.split(jax.random.key(1), 4)
    values = jax.random.randint(keys[0], (len(sizes), out, width), -8, 8, jnp.int8)
    scale = jax.random.uniform(keys[1], (len(sizes), width // 32, out), minval=0.01, maxval=0.1)
    weight = PackedWeight(values.astype(jnp.int4), scale.astype(jnp.bfloat16))
    total = int(sizes.sum())
    x = jax.random.normal(keys[2], (total, width), jnp.bfloat16)
    dy = jax.random.normal(keys[3], (total, out), jnp.bfloat16)
    assert choose(x, weight, None) == "pallas"
    y, pullback = jax.vjp(lambda x: api.grouped_matmul(x, weight, sizes), x)
    (dx,) = pullback(dy)
    start = 0
    with jax.default_matmul_precision("highest"):
        for group, size in enumerate(K2_ROWS[rows]):
            mine = slice(start, start + size)
            plain = dequantise(weight.values[group], weight.scale[group]).astype(jnp.float32)
            for found, rows_in, matrix in ((y, x, plain.T), (dx, dy, plain)):
                wanted = rows_in[mine].astype(jnp.float32) @ matrix
                difference = jnp.linalg.norm(found[mine].astype(jnp.float32) - wanted)
                assert difference <= TOLERANCE * jnp.linalg.norm(wanted), (group, difference)
            start += size
