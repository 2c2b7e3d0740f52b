"""Routed experts over ranks: nothing dropped, whatever the routing and the buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kimi_jax.kernels.recall import recalled
from kimi_jax.parallel.experts import routed
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks

ROWS, WIDTH, EXPERTS, K = 160, 8, 16, 3
ROUTINGS = ("even", "skewed", "one")


def compute(trained, frozen, x_AD, weights_A, sizes, known):
    """An expert is x · (frozen + trained), times the routing weight; rows behind the groups are NaN.

    Kept is what the routing weight multiplies.
    """
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x_AD.shape[0])
    group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(sizes) - 1)

    def multiply(x_AD, trained):
        return jnp.einsum("ad,ado->ao", x_AD, (frozen + trained)[group])

    p_AD = multiply(x_AD, trained) if known is None else recalled(multiply, known, x_AD, trained)
    return jnp.where((row < ends[-1])[:, None], p_AD * weights_A[:, None], jnp.nan), p_AD


def operands(routing):
    rng = np.random.default_rng(0)
    chance = {"even": np.ones(EXPERTS), "skewed": np.arange(1.0, EXPERTS + 1) ** 3}.get(
        routing, np.repeat([1.0, 0.0], [K, EXPERTS - K])
    )
    experts = np.stack(
        [rng.choice(EXPERTS, K, replace=False, p=chance / chance.sum()) for _ in range(ROWS)]
    )
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "trained": draw(EXPERTS, WIDTH, WIDTH),
        "frozen": draw(EXPERTS, WIDTH, WIDTH),
        "x": draw(ROWS, WIDTH),
        "weights": draw(ROWS, K),
        "experts": experts.astype(np.int32),
        "dy": draw(ROWS, WIDTH),
    }


def value_and_gradients(ranks, given):
    """y, and the gradients of Σ dy · y with respect to trained, x and weights."""

    def run(trained, frozen, x, weights, experts, dy):
        def scalar(trained, x, weights):
            y = routed(ranks, compute, trained, frozen, x, experts, weights, EXPERTS)
            return jnp.sum(y * dy), y

        return jax.grad(scalar, (0, 1, 2), has_aux=True)(trained, x, weights)

    spread = P(("data", "expert"))
    mine = P("expert")
    program = ranks.run(run, (mine, mine, *[spread] * 4), ((mine, spread, spread), spread))
    gradients, y = jax.jit(program)(*given.values())
    return [np.asarray(y), *(np.asarray(g) for g in gradients)]


def expected(given):
    """Every assignment by itself, in float64."""
    f = {key: value.astype(np.float64) for key, value in given.items() if key != "experts"}
    matrices = f["frozen"] + f["trained"]
    y, dx = np.zeros_like(f["x"]), np.zeros_like(f["x"])
    dw, dt = np.zeros_like(f["weights"]), np.zeros_like(f["trained"])
    for row in range(ROWS):
        for k, expert in enumerate(given["experts"][row]):
            out = f["x"][row] @ matrices[expert]
            y[row] += f["weights"][row, k] * out
            dw[row, k] = out @ f["dy"][row]
            dx[row] += f["weights"][row, k] * matrices[expert] @ f["dy"][row]
            dt[expert] += f["weights"][row, k] * np.outer(f["x"][row], f["dy"][row])
    return [y, dt, dx, dw]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("buffer", [0.01, 1.5, 8.0])
def test_every_assignment_is_computed_once(routing, buffer):
    """0.01: 128 rows a pass, up to four passes; 8: always one. fp32 sums of at most 160 terms."""
    given = operands(routing)
    ranks = Ranks(8, mesh=make_mesh(8), buffer=buffer)
    for found, wanted in zip(value_and_gradients(ranks, given), expected(given), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


def test_the_buffer_is_smaller_than_the_worst_routing():
    """Or the test above would never make a second pass."""
    ranks = Ranks(8, mesh=make_mesh(8), buffer=0.01)
    assert ranks.buffer_rows(ROWS * K) * 2 < ROWS * K
    assert ONE_DEVICE.buffer_rows(ROWS * K) == ROWS * K


def test_one_device_computes_the_same():
    given = operands("skewed")
    for found, wanted in zip(value_and_gradients(ONE_DEVICE, given), expected(given), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


def test_replicas_along_data_have_rows_of_their_own():
    """Two replicas: each rank's gradient of its experts is its replica's part of the sum."""
    given = operands("skewed")
    ranks = Ranks(4, 2, make_mesh(4, 2), buffer=0.01)

    def run(trained, frozen, x, weights, experts, dy):
        def scalar(trained):
            y = routed(ranks, compute, trained, frozen, x, experts, weights, EXPERTS)
            return jnp.sum(y * dy), y

        gradient, y = jax.grad(scalar, has_aux=True)(trained)
        return ranks.sum_where_replicated(gradient, P("expert")), y

    spread, mine = P(("data", "expert")), P("expert")
    program = ranks.run(run, (mine, mine, *[spread] * 4), (mine, spread))
    gradient, y = jax.jit(program)(*given.values())
    wanted = expected(given)
    np.testing.assert_allclose(y, wanted[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(gradient, wanted[1], rtol=1e-5, atol=2e-5)
