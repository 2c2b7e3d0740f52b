"""The grouped matmul's Hopper kernels against fp32 on dequantised weights, on a GPU.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`, or without
pytest `python tests/device/test_grouped_matmul.py`.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from kimi_jax.int4 import dequantise
from kimi_jax.kernels.grouped_matmul import mosaic
from kimi_jax.kernels.grouped_matmul.mosaic_body import Tuning
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight

try:
    import pytest
except ImportError:  # run as a script
    pytest = None

GROUPS, OUT, IN, SCALE, TOLERANCE = 6, 512, 768, 2.0, 4e-3
SIZES = {
    "not multiples of a tile": [100, 300, 1, 17, 65, 255],
    "empty groups, first and last too": [0, 418, 0, 0, 320, 0],
    "all in one": [0, 0, 738, 0, 0, 0],
    "multiples of tiles": [64, 128, 192, 256, 64, 34],
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
    "few rows": mosaic.FEW_ROWS,
    "thin": Tuning(widths=(32, 64), stages=4),
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
    + [("few rows", "none", name) for name in list(SIZES)[:2]]
    + [("few rows", "per group", "not multiples of a tile"), ("thin", "none", "all in one")]
)


def run_case(tuning, adapter, sizes):
    check(TUNINGS[tuning], ADAPTERS[adapter], SIZES[sizes])


def run_layer():
    """A stacked weight is read at its layer; fails if the layer's offset is lost."""
    check(mosaic.MANY_ROWS, None, SIZES["not multiples of a tile"], layers=(3,), layer=2)


def run_one_row():
    """Fewer rows than any tile, and rows that no copy may write beyond."""
    check(mosaic.FEW_ROWS, None, [0, 0, 0, 1, 0, 0])


if pytest is not None:
    on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

    @on_gpu
    @pytest.mark.parametrize(("tuning", "adapter", "sizes"), CASES)
    def test_product_and_gradients(tuning, adapter, sizes):
        run_case(tuning, adapter, sizes)

    @on_gpu
    def test_layer_of_a_stack():
        run_layer()

    @on_gpu
    def test_one_row():
        run_one_row()


def main():
    failures = 0
    runs = [(", ".join(case), partial(run_case, *case)) for case in CASES]
    for name, run in [*runs, ("layer of a stack", run_layer), ("one row", run_one_row)]:
        try:
            run()
            print("passed:", name, flush=True)
        except Exception as error:
            failures += 1
            print("FAILED:", name, "|", type(error).__name__, str(error)[:300], flush=True)
    raise SystemExit(failures)


if __name__ == "__main__":
    main()
