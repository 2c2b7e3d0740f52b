"""The Hopper kernels that move tokens in Pallas' interpreter, against gathers."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import token_movement as movement
from kimi_jax.kernels.grouped_matmul import factor_gradient, mosaic, project
from kimi_jax.kernels.grouped_matmul.mosaic_body import Tuning
from kimi_jax.kernels.target import compiling_for
from kimi_jax.kernels.token_movement import scatter, sums

TOKENS, K, EXPERTS, WIDTH = 5, 3, 6, 1024


@pytest.fixture(scope="module")
def order():
    """Experts 0 to 3 are here."""
    chosen = jax.random.randint(jax.random.key(1), (TOKENS, K), 0, EXPERTS)
    return movement.sort_by_expert(chosen, 4)


def test_scatter(order):
    """A window that begins within the rows and ends beyond them: what is nobody's is zero."""
    x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH), jnp.bfloat16)
    total = order.group_sizes.sum()
    start, capacity = 2, TOKENS * K
    assert start < total < start + capacity
    found = scatter.scatter_rows(x, order.row, K, jnp.int32(start), total, capacity, interpret=True)
    wanted = movement.dispatch_window(x, order, K, start, capacity, impl="gather")
    np.testing.assert_array_equal(found, wanted)


def test_only_what_kernels_may_read_is_cleared(order, monkeypatch):
    """Behind the last row: so many rows of zeros, and nothing is promised of the others."""
    monkeypatch.setattr(scatter, "CLEARED", 3)
    x = jnp.ones((TOKENS, WIDTH), jnp.bfloat16)
    total, capacity = order.group_sizes.sum(), TOKENS * K
    end = int(total)
    assert end + 3 < capacity
    found = scatter.scatter_rows(x, order.row, K, jnp.int32(0), total, capacity, interpret=True)
    np.testing.assert_array_equal(found[:end], 1)
    np.testing.assert_array_equal(found[end : end + 3], 0)
    # The interpreter fills what is not written with NaN.
    assert jnp.isnan(found[end + 3 :].astype(jnp.float32)).all()


def test_no_tile_reaches_behind_what_is_cleared():
    """Kernels that sum over a tile's rows would sum what nobody wrote."""
    tunings = (value for value in vars(mosaic).values() if isinstance(value, Tuning))
    widest = [max(tuning.widths) for tuning in tunings]
    assert len(widest) >= 3
    assert max(*widest, factor_gradient.TILE, project.TILE) <= scatter.CLEARED


@pytest.mark.parametrize(("start", "capacity"), [(2, TOKENS * K), (1, 4)])
def test_sums(order, start, capacity):
    """Rows of others' windows, and rows that are nobody's, are not even read."""
    y = jax.random.normal(jax.random.key(0), (capacity, WIDTH), jnp.bfloat16)
    total = order.group_sizes.sum()
    y = jnp.where((jnp.arange(capacity) < total - start)[:, None], y, jnp.nan)
    found = sums.sum_rows(y, order.row, K, jnp.int32(start), total, interpret=True)
    wanted = movement.combine_window(y, order, K, start, impl="gather")
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("start", "capacity"), [(2, TOKENS * K), (1, 4), (0, 2)])
def test_sums_are_added_in_place(order, start, capacity):
    """The same bits as gathers give; a token without a row in the window keeps its own."""
    y = jax.random.normal(jax.random.key(0), (capacity, WIDTH), jnp.bfloat16)
    onto = jax.random.normal(jax.random.key(2), (TOKENS, WIDTH), jnp.bfloat16)
    total = order.group_sizes.sum()
    y = jnp.where((jnp.arange(capacity) < total - start)[:, None], y, jnp.nan)
    place = np.asarray(order.row).reshape(TOKENS, K) - start
    there = ((place >= 0) & (place < min(capacity, int(total) - start))).any(axis=1)
    assert there.any()
    onto = onto.at[0, 0].set(jnp.bfloat16(-0.0))
    found = sums.sum_rows(y, order.row, K, jnp.int32(start), total, onto, interpret=True)
    wanted = movement.add_window(onto, y, order, K, start, impl="gather")
    np.testing.assert_array_equal(found, wanted)
    assert (np.asarray(found)[~there].tobytes()) == np.asarray(onto)[~there].tobytes()


def test_add_window_asks_the_kernel_for_its_window(order, monkeypatch):
    y = jax.random.normal(jax.random.key(0), (4, WIDTH), jnp.bfloat16)
    onto = jax.random.normal(jax.random.key(2), (TOKENS, WIDTH), jnp.bfloat16)
    wanted = movement.add_window(onto, y, order, K, 2, impl="gather")

    def kernel(impl, name, rows):
        assert (impl, name, rows.shape) == ("auto", "sums", y.shape)
        return SimpleNamespace(sum_rows=partial(sums.sum_rows, interpret=True))

    monkeypatch.setattr(movement.movement, "_kernel", kernel)
    np.testing.assert_array_equal(movement.add_window(onto, y, order, K, 2), wanted)


@pytest.mark.parametrize("width", [1024, 100])
def test_auto_is_the_kernel_on_hopper(order, width):
    """For rows that it takes; named, it raises for others."""
    x = jnp.zeros((TOKENS, width), jnp.bfloat16)

    def there_and_back(x):
        rows = movement.dispatch_window(x, order, K, 0, 8)
        back = movement.combine_window(rows, order, K, 0)
        return movement.add_window(back, rows, order, K, 0)

    with compiling_for("NVIDIA H200"):
        names = str(jax.make_jaxpr(there_and_back)(x))
    taken = width == 1024
    assert [name in names for name in ("scatter_rows", "sum_rows", "add_rows")] == [taken] * 3
    if not taken:
        with pytest.raises(UserError, match="required"):
            movement.dispatch(x, order, K, impl="pallas")
