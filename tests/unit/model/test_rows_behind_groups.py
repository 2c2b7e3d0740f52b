"""Rows of the expert buffer that belong to no group: kernels leave them unwritten and want them finite."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels import api
from kimi_jax.model import moe

ROWS, REAL, WIDTH = 6, 4, 8
SIZES = jnp.array([1, 3], jnp.int32)


def unwritten(y):
    return jnp.where(jnp.arange(ROWS)[:, None] < REAL, y, jnp.nan)


@jax.custom_vjp
def like_a_kernel(x):
    """Twice the rows, NaN behind the groups in both directions."""
    return unwritten(2 * x)


def forward(x):
    return like_a_kernel(x), x


def backward(x, dy):
    """A factor's gradient sums over whole tiles: operands that are not finite poison it."""
    poison = 0 * (jnp.sum(dy) + jnp.sum(x))
    return (unwritten(2 * dy) + poison,)


like_a_kernel.defvjp(forward, backward)


@pytest.fixture
def experts(monkeypatch):
    monkeypatch.setattr(api, "grouped_matmul", lambda x, *_, **__: like_a_kernel(x))
    monkeypatch.setattr(
        api, "grouped_matmul_pair", lambda x, *_, **__: (like_a_kernel(x), like_a_kernel(x))
    )
    monkeypatch.setattr(api, "grouped_low_rank", lambda *_: None)
    empty = SimpleNamespace(grouped_weight=None, adapter=None)
    return SimpleNamespace(gate_proj=empty, up_proj=empty, down_proj=empty)


def test_nothing_but_finite_rows_reaches_a_kernel(experts):
    x = jnp.ones((ROWS, WIDTH)).at[REAL:].set(0)

    def total(x, weights):
        y, _ = moe.Experts.__call__(experts, x, SIZES, weights, jnp.int32(0))
        return jnp.sum(y[:REAL])

    weights = jnp.ones(ROWS).at[REAL:].set(0)
    value, (dx, dw) = jax.value_and_grad(total, (0, 1))(x, weights)
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(dx[:REAL])).all()
    assert np.isfinite(np.asarray(dw[:REAL])).all()
