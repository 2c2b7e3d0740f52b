"""The Hopper kernels' schedule, pipelines and derivatives, in the Mosaic GPU interpreter.

The interpreter has no registers by lanes: decoding and storing there are plain JAX. What
`fragments` does on a GPU is tested by tests/device.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.int4 import dequantise_numpy
from kimi_jax.kernels.grouped_matmul import fragments, mosaic, mosaic_body
from kimi_jax.kernels.grouped_matmul.mosaic_body import Tuning
from kimi_jax.kernels.grouped_matmul.schedule import FIRST, GROUP, ROWS, WIDTH, tile_table
from kimi_jax.kernels.grouped_matmul.thin import multiply_few
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight

WIDTHS = (16, 32, 48)
GROUPS, SIZE, RANK, SCALE = 3, 256, 5, 2.0
SMALL = Tuning(widths=(16, 32), stages=3, blocks=2, turns=2)
# A group whose tail shares a copy with the next group's rows, an empty one, one of several tiles.
SIZES = np.array([21, 0, 37], np.int32)
LAYERS, LAYER = 2, 1


@pytest.mark.parametrize(
    "sizes", [[0, 50, 48, 0, 1, 97], [0, 0, 0, 0, 0, 196], [196, 0, 0, 0, 0, 0], [0] * 6]
)
def test_tiles_cover_each_row_once_widest_first(sizes):
    """Fails if a row is lost or done twice, a tile spans groups, or a tile's width is too small."""
    table, count = tile_table(jnp.array(sizes, jnp.int32), 196, WIDTHS)
    tiles = np.asarray(table)[: int(count[0])]
    group_of_row = np.repeat(np.arange(6), sizes)
    seen = np.concatenate([[], *(np.arange(t[ROWS]) + t[FIRST] for t in tiles)])
    assert sorted(seen) == list(range(sum(sizes)))
    for tile in tiles:
        assert (group_of_row[tile[FIRST] : tile[FIRST] + tile[ROWS]] == tile[GROUP]).all()
        fitting = [width for width in WIDTHS if width >= tile[ROWS]]
        assert WIDTHS[tile[WIDTH]] == fitting[0]
    assert (np.diff(tiles[:, WIDTH]) <= 0).all()


@pytest.mark.parametrize("order", list(fragments.Order))
def test_factors_stand_where_threads_look_for_them(order):
    """Each value once, at the feature and column that fragments' orders name."""
    features, rank = 256, 16
    factor = jnp.arange(2 * features * rank).reshape(2, features, rank)
    arranged = np.asarray(fragments.arrange_factor(factor, order))
    assert sorted(arranged.flatten()) == sorted(np.asarray(factor).flatten())
    for thread in (0, 1, 37, 130, 255):
        wg, w, c, t = thread // 128, thread // 32 % 4, thread % 32 // 4, thread % 4
        values = arranged[1, 1, thread].reshape(2, 2, 2)  # column tile, i, one of a pair
        for tile, i, e in np.ndindex(2, 2, 2):
            by_row = 64 * wg + 16 * w + 2 * c + i
            feature = by_row if order is fragments.Order.BY_ROW else 32 * w + 4 * c + 2 * wg + i
            assert values[tile, i, e] == factor[1, 128 + feature, 8 * tile + 2 * t + e]


def test_warpgroups_ask_for_no_more_registers_than_the_block_has():
    """More would wait for ever: no warpgroup releases them, and the GPU hangs."""
    warpgroups = mosaic_body.COMPUTING + 1
    of_a_thread = 65536 // (128 * warpgroups) // 8 * 8
    asked = mosaic_body.MEMORY_REGISTERS + mosaic_body.COMPUTING * mosaic_body.COMPUTE_REGISTERS
    assert asked <= warpgroups * of_a_thread


def operands():
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (LAYERS, GROUPS, SIZE, SIZE)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, (LAYERS, GROUPS, SIZE, SIZE // 32)).astype(ml_dtypes.bfloat16)
    weight = PackedWeight(jnp.asarray(codes, jnp.int4), jnp.asarray(scale.swapaxes(2, 3)))
    plain = dequantise_numpy(codes[LAYER], scale[LAYER]).astype(np.float64)
    x, dy = (rng.normal(size=(SIZES.sum(), SIZE)).astype(ml_dtypes.bfloat16) for _ in range(2))
    a = rng.normal(size=(RANK, SIZE)).astype(ml_dtypes.bfloat16).astype(np.float32)
    b = rng.normal(size=(GROUPS, SIZE, RANK)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return weight, plain, x, dy, a, b


def product_and_gradients(weight, x, dy, a, b):
    def product(x, a, b):
        adapter = None if a is None else GroupedAdapter(a, b, SCALE)
        sizes = jnp.asarray(SIZES)
        return mosaic.grouped_matmul(x, weight, sizes, adapter, LAYER, SMALL, interpret=True)

    y, pullback = jax.vjp(product, x, a, b)
    return y, *pullback(dy)


def assert_close(found, wanted):
    found = np.asarray(found).astype(np.float64)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= 4e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "shared a, b per group"])
def test_product_and_gradients(adapted):
    """A layer of a stack; groups that end within a tile; one that is empty."""
    weight, plain, x, dy, a, b = operands()
    factors = (jnp.asarray(a), jnp.asarray(b)) if adapted else (None, None)
    found = product_and_gradients(weight, jnp.asarray(x), jnp.asarray(dy), *factors)
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    y, dx = np.zeros_like(x), np.zeros_like(x)
    da, db = np.zeros(a.shape), np.zeros(b.shape)
    for group, rows in enumerate(np.split(np.arange(len(x)), np.cumsum(SIZES)[:-1])):
        y[rows], dx[rows] = x[rows] @ plain[group].T, dy[rows] @ plain[group]
        if adapted:
            low, low_dy = SCALE * x[rows] @ a.T, SCALE * dy[rows] @ b[group]
            y[rows] += low @ b[group].T
            dx[rows] += low_dy @ a
            da += low_dy.T @ x[rows]
            db[group] = dy[rows].T @ low
    for value, wanted in zip(found, (y, dx, da, db)[: 4 if adapted else 2], strict=False):
        assert_close(value, wanted)
    assert adapted or found[2:] == (None, None)


@pytest.mark.parametrize("order", list(fragments.Order))
def test_few_rows(order):
    """A layer of a stack, by blocks that look for their rows; more and fewer rows than a pass."""
    weight, plain, x, _, _, _ = operands()
    found = multiply_few(jnp.asarray(x), weight, jnp.asarray(SIZES), order, LAYER, interpret=True)
    by_feature = plain if order is fragments.Order.BY_ROW else plain.swapaxes(1, 2)
    wanted = np.concatenate(
        [
            rows @ by_feature[group].T
            for group, rows in enumerate(np.split(x.astype(np.float64), np.cumsum(SIZES)[:-1]))
        ]
    )
    assert_close(found, wanted)


def test_no_dequantised_weight_is_kept():
    """What the backward pass holds of the weight is the packed arrays themselves."""
    weight, _, x, _, a, b = operands()

    def product(x, a, b):
        adapter = GroupedAdapter(a, b, SCALE)
        return mosaic.grouped_matmul(x, weight, jnp.asarray(SIZES), adapter, LAYER, SMALL, True)

    pullback = jax.eval_shape(lambda *v: jax.vjp(product, *v)[1], jnp.asarray(x), a, b)
    kept = [v for v in jax.tree.leaves(pullback) if v.dtype != jnp.int4]
    assert max(v.size for v in kept) <= max(x.size, weight.scale.size, b.size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((58, SIZE))}, "rows are float32; required: bfloat16"),
        ({"weight": jnp.zeros((GROUPS, SIZE, SIZE))}, "the weight is not packed int4"),
        ({"rank": 65}, "rank is 65; required: at most 64"),
        ({"size": 192}, "in is 192; required: a multiple of 128 from 256"),
    ],
)
def test_refusals_name_what_is_wrong(change, message):
    size, rank = change.get("size", SIZE), change.get("rank", RANK)
    packed = PackedWeight(
        jnp.zeros((GROUPS, size, size), jnp.int4),
        jnp.zeros((GROUPS, size // 32, size), jnp.bfloat16),
    )
    x = change.get("x", jnp.zeros((58, size), jnp.bfloat16))
    adapter = GroupedAdapter(jnp.zeros((rank, size)), jnp.zeros((size, rank)), 1.0)
    with pytest.raises(UserError, match=message):
        mosaic.check(x, change.get("weight", packed), adapter)
