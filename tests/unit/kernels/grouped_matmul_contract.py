"""What every implementation of `grouped_matmul` must do: inherit, and name it in `impl`.

    class TestMine(GroupedMatmulContract):
        impl = "mine"

The rows, group sizes and factors are small and odd: groups that are empty, alone, or not a multiple
of any tile. Expectations are loops over rows in float64.
"""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kimi_jax.int4 import dequantise_numpy
from kimi_jax.kernels import api
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight

GROUPS, IN, OUT, RANK, SCALE = 5, 64, 48, 3, 1.5
GROUP_SIZES = {
    "even": [17, 17, 16, 16, 16],
    "empty groups, first and last too": [0, 37, 0, 45, 0],
    "all in one": [0, 0, 82, 0, 0],
    "all in the last": [0, 0, 0, 0, 82],
    "around multiples of a tile": [33, 1, 31, 16, 1],
}
ROWS = 82
ADAPTERS = {
    "none": None,
    "per group": ((GROUPS, RANK, IN), (GROUPS, OUT, RANK)),
    "shared a": ((RANK, IN), (GROUPS, OUT, RANK)),
    "shared b": ((GROUPS, RANK, IN), (OUT, RANK)),
}


def operands(packed, adapter_shapes, rows, dtype=np.float32, seed=0):
    """(x, weight as the kernel takes it, the same weight in float64, a, b) with numpy's values."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, IN)).astype(np.float32).astype(dtype)
    if packed:
        codes = rng.integers(-8, 8, (GROUPS, OUT, IN)).astype(np.int8)
        scale = rng.uniform(0.01, 0.1, (GROUPS, OUT, IN // 32)).astype(ml_dtypes.bfloat16)
        plain = dequantise_numpy(codes, scale)
        weight = PackedWeight(jnp.asarray(codes, jnp.int4), jnp.asarray(scale.swapaxes(1, 2)))
    else:
        plain = rng.normal(size=(GROUPS, OUT, IN)).astype(ml_dtypes.bfloat16)
        weight = jnp.asarray(plain)
    a, b = (
        (rng.normal(size=shape).astype(np.float32) for shape in adapter_shapes)
        if adapter_shapes
        else (None, None)
    )
    return x, weight, plain.astype(np.float64), a, b


def factor_of(factor, group):
    return factor[group] if factor.ndim == 3 else factor


def expected_product(x, weight, group_of_row, a, b):
    y = np.empty((len(x), OUT))
    for row, group in enumerate(group_of_row):
        y[row] = weight[group] @ x[row]
        if a is not None:
            y[row] += SCALE * factor_of(b, group) @ (factor_of(a, group) @ x[row])
    return y


def expected_gradients(x, weight, group_of_row, a, b, dy):
    """Of sum(y · dy) with respect to x, a and b."""
    dx = np.empty_like(x)
    da, db = (None, None) if a is None else (np.zeros_like(a), np.zeros_like(b))
    for row, group in enumerate(group_of_row):
        dx[row] = dy[row] @ weight[group]
        if a is not None:
            a_g, b_g = factor_of(a, group), factor_of(b, group)
            low = SCALE * dy[row] @ b_g
            dx[row] += low @ a_g
            factor_of(da, group)[...] += np.outer(low, x[row])
            factor_of(db, group)[...] += SCALE * np.outer(dy[row], a_g @ x[row])
    return dx, da, db


def assert_close(found, expected, tolerance=2e-6):
    """Largest difference, relative to the largest value."""
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)


class GroupedMatmulContract:
    impl: ClassVar[str]

    @pytest.fixture(scope="class", params=["packed", "plain"])
    def packed(self, request):
        return request.param == "packed"

    @pytest.fixture(scope="class", params=ADAPTERS)
    def shapes(self, request):
        return ADAPTERS[request.param]

    @pytest.fixture(scope="class")
    def product_and_gradients(self, packed, shapes, quickly):
        """The operands, and a compiled function of group sizes and dy."""
        x, weight, plain, a, b = operands(packed, shapes, ROWS)

        def product(group_sizes, x, a, b):
            adapter = None if a is None else GroupedAdapter(a, b, SCALE)
            return api.grouped_matmul(x, weight, group_sizes, adapter, impl=self.impl)

        def both(group_sizes, dy, x, a, b):
            y, pullback = jax.vjp(partial(product, group_sizes), x, a, b)
            return y, pullback(dy)

        sizes, dy = jnp.zeros(GROUPS, jnp.int32), jnp.zeros((ROWS, OUT))
        compiled = quickly(both, sizes, dy, x, a, b)
        return (x, plain, a, b), lambda sizes, dy: compiled(sizes, dy, x, a, b)

    @pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
    def test_product_and_gradients(self, product_and_gradients, sizes):
        """Rows in a wrong tile or group, or a factor's gradient that misses a group, show here."""
        (x, plain, a, b), compute = product_and_gradients
        assert sum(sizes) == ROWS
        dy = np.random.default_rng(1).normal(size=(ROWS, OUT)).astype(np.float32)
        y, (dx, da, db) = compute(np.array(sizes, np.int32), dy)
        group_of_row = np.repeat(np.arange(GROUPS), sizes)
        exact = [None if v is None else v.astype(np.float64) for v in (x, a, b)]
        x, a, b = exact
        assert_close(y, expected_product(x, plain, group_of_row, a, b))
        expected = expected_gradients(x, plain, group_of_row, a, b, dy.astype(np.float64))
        for found, wanted in zip((dx, da, db), expected, strict=True):
            if wanted is None:
                assert found is None
            else:
                assert_close(found, wanted)

    def test_one_row(self):
        x, weight, plain, a, b = operands(True, ADAPTERS["per group"], 1)
        sizes = jnp.array([0, 0, 0, 1, 0], jnp.int32)
        adapter = GroupedAdapter(jnp.asarray(a), jnp.asarray(b), SCALE)
        y = api.grouped_matmul(jnp.asarray(x), weight, sizes, adapter, impl=self.impl)
        assert_close(y, expected_product(x, plain, [3], a, b))

    def test_bfloat16_rows_accumulate_in_fp32(self):
        """The product has the rows' dtype and is rounded once: bf16 sums would be off by more."""
        x, weight, plain, _, _ = operands(True, None, ROWS, ml_dtypes.bfloat16)
        sizes = np.array(GROUP_SIZES["even"], np.int32)
        y = api.grouped_matmul(jnp.asarray(x), weight, jnp.asarray(sizes), impl=self.impl)
        assert y.dtype == jnp.bfloat16
        group_of_row = np.repeat(np.arange(GROUPS), sizes)
        exact = expected_product(x.astype(np.float64), plain, group_of_row, None, None)
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-4)

    def test_bfloat16_rows_with_adapter(self, quickly):
        """fp32 factors are cast at use and get fp32 gradients."""
        x, weight, plain, a, b = operands(True, ADAPTERS["per group"], ROWS, ml_dtypes.bfloat16)
        sizes = np.array(GROUP_SIZES["even"], np.int32)

        def total(sizes, x, a, b):
            y = api.grouped_matmul(x, weight, sizes, GroupedAdapter(a, b, SCALE), impl=self.impl)
            return y.astype(jnp.float32).sum(), y

        gradient = jax.grad(total, argnums=(1, 2, 3), has_aux=True)
        (dx, da, db), y = quickly(gradient, sizes, x, a, b)(sizes, x, a, b)
        assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
        assert (da.dtype, db.dtype) == (jnp.float32, jnp.float32)
        x = x.astype(np.float64)
        group_of_row = np.repeat(np.arange(GROUPS), sizes)
        expected = expected_product(x, plain, group_of_row, a, b)
        ones = np.ones_like(expected)
        wanted = expected_gradients(x, plain, group_of_row, a, b, ones)
        for found, want in zip((y, dx, da, db), (expected, *wanted), strict=True):
            assert_close(found, want, tolerance=2**-6)

    def test_layers_of_a_stack(self, packed, quickly):
        """As the model calls it: a scan over layers, recomputed, with the whole stack closed over.

        Fails if the layer is lost, in the product, in the backward pass or in the recomputation.
        """
        shapes = ADAPTERS["per group"]
        layers = [operands(packed, shapes, ROWS, seed=seed) for seed in range(3)]
        x, _, _, _, _ = layers[0]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer[1] for layer in layers))
        factors = tuple(np.stack([layer[at] for layer in layers]) for at in (3, 4))
        sizes = jnp.array(GROUP_SIZES["around multiples of a tile"], jnp.int32)
        coefficients = np.random.default_rng(9).normal(size=(3, ROWS, OUT)).astype(np.float32)

        def scanned(x, factors):
            @jax.checkpoint
            def one(total, each):
                layer, (a, b), coefficient = each
                y = api.grouped_matmul(
                    x, stack, sizes, GroupedAdapter(a, b, SCALE), impl=self.impl, layer=layer
                )
                return total + (y * coefficient).sum(), None

            each = (jnp.arange(3), factors, coefficients)
            return jax.lax.scan(one, jnp.float32(0), each)[0]

        gradient = quickly(jax.grad(scanned, argnums=(0, 1)), x, factors)
        dx, (da, db) = gradient(x, factors)
        group_of_row = np.repeat(np.arange(GROUPS), sizes)
        wanted = [
            expected_gradients(
                x.astype(np.float64), layer[2], group_of_row, *layer[3:], coefficient
            )
            for layer, coefficient in zip(layers, coefficients.astype(np.float64), strict=True)
        ]
        assert_close(dx, sum(each[0] for each in wanted), tolerance=1e-5)
        for found, at in ((da, 1), (db, 2)):
            assert_close(found, np.stack([each[at] for each in wanted]), tolerance=1e-5)
