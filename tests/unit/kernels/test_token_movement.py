"""Tokens to their experts' rows and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels.token_movement import combine, dispatch, sort_by_expert
from tests.unit.jaxprs import all_equations

TOKENS, K, WIDTH, EXPERTS = 7, 3, 4, 6
CHOSEN = np.array(
    [[5, 0, 2], [2, 5, 4], [0, 2, 5], [4, 2, 0], [5, 4, 2], [0, 5, 4], [2, 4, 0]], np.int32
)  # experts 1 and 3 stay empty


@pytest.fixture(scope="module")
def order():
    return sort_by_expert(jnp.asarray(CHOSEN), EXPERTS)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(TOKENS * K, WIDTH))


def expected_assignments():
    pairs = [(CHOSEN[t, k], t * K + k) for t in range(TOKENS) for k in range(K)]
    return [flat for _, flat in sorted(pairs)]


def test_order(order):
    """Stable: within an expert, tokens keep their order, so that results do not depend on the sort."""
    assert order.assignment.tolist() == expected_assignments()
    assert [order.assignment.tolist()[row] for row in order.row] == list(range(TOKENS * K))
    assert order.group_sizes.tolist() == [5, 0, 6, 0, 5, 5]


def test_dispatch_and_combine(order, rows):
    x, y = rows
    token_of_row = np.array(expected_assignments()) // K
    sent = dispatch(jnp.asarray(x, jnp.float32), order, K)
    np.testing.assert_array_equal(sent, x.astype(np.float32)[token_of_row])
    summed = np.zeros_like(x)
    np.add.at(summed, token_of_row, y)
    back = combine(jnp.asarray(y, jnp.float32), order, K)
    np.testing.assert_allclose(back, summed, rtol=1e-5, atol=1e-6)


def test_each_is_the_transpose_of_the_other(order, rows):
    """The hand-written derivatives are those of the functions: gather back what was scattered."""
    x, y = (jnp.asarray(value, jnp.float32) for value in rows)
    token_of_row = np.array(expected_assignments()) // K
    _, pull_dispatch = jax.vjp(lambda x: dispatch(x, order, K), x)
    np.testing.assert_array_equal(pull_dispatch(y)[0], combine(y, order, K))
    _, pull_combine = jax.vjp(lambda y: combine(y, order, K), y)
    np.testing.assert_array_equal(pull_combine(x)[0], np.asarray(x)[token_of_row])


def test_no_direction_scatters(order, rows):
    """Scatter-add's order, and so its rounding, is not fixed on a GPU."""
    x = jnp.asarray(rows[0], jnp.float32)

    def there_and_back(x):
        return (combine(jnp.tanh(dispatch(x, order, K)), order, K) ** 2).sum()

    names = {e.primitive.name for e in all_equations(jax.make_jaxpr(jax.grad(there_and_back))(x))}
    assert "gather" in names
    assert not any(name.startswith("scatter") for name in names)


def test_sums_are_fp32():
    """In bf16, 256 + 1 is 256, three times over; the sum of 259 rounds to 260."""
    order = sort_by_expert(jnp.array([[0, 1, 2, 3]], jnp.int32), 4)
    y = jnp.array([[256], [1], [1], [1]], jnp.bfloat16)
    out = combine(y, order, 4)
    assert out.dtype == jnp.bfloat16
    assert out.tolist() == [[260]]
