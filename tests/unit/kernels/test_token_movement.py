"""Tokens to their experts' rows and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.kernels.token_movement import (
    add_window,
    combine,
    combine_window,
    dispatch,
    dispatch_window,
    sort_by_expert,
    window_sizes,
)
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


# Experts 2 to 4 are here: 6 + 0 + 5 rows of 21. Windows of 4 end in the middle of groups, the last is
# not full, and a last one begins where there is nothing left.
FIRST, HERE, CAPACITY = 2, 3, 4
STARTS = (0, 4, 8, 12)


@pytest.fixture(scope="module")
def local_order():
    return sort_by_expert(jnp.asarray(CHOSEN), HERE, jnp.int32(FIRST))


def local_tokens():
    """The token of each row that is here, in order."""
    here = [flat for flat in expected_assignments() if 0 <= CHOSEN.flat[flat] - FIRST < HERE]
    return np.array(here) // K


def test_local_order(local_order):
    """Other devices' assignments come last, and in no group."""
    assert local_order.group_sizes.tolist() == [6, 0, 5]
    assert (local_order.assignment[:11] // K).tolist() == local_tokens().tolist()
    assert sorted(local_order.assignment.tolist()) == list(range(TOKENS * K))
    assert [local_order.assignment.tolist()[row] for row in local_order.row] == list(
        range(TOKENS * K)
    )


def test_windows_make_the_whole(local_order, rows):
    """Each local row is in one window, and what is not local is neither sent nor summed."""
    x = rows[0].astype(np.float32)
    sent = [dispatch_window(jnp.asarray(x), local_order, K, s, CAPACITY) for s in STARTS]
    wanted = np.zeros((len(STARTS) * CAPACITY, WIDTH), np.float32)
    wanted[:11] = x[local_tokens()]
    np.testing.assert_array_equal(np.concatenate(sent), wanted)
    y = rows[1][: len(wanted)].astype(np.float32)
    y[11:] = np.nan  # never written by anybody
    back = sum(
        combine_window(jnp.asarray(y[s : s + CAPACITY]), local_order, K, jnp.int32(s))
        for s in STARTS
    )
    summed = np.zeros((TOKENS, WIDTH))
    np.add.at(summed, local_tokens(), y[:11])
    np.testing.assert_allclose(back, summed, rtol=1e-5, atol=1e-6)
    added = jnp.asarray(x)
    for s in STARTS:
        added = add_window(added, jnp.asarray(y[s : s + CAPACITY]), local_order, K, s)
    np.testing.assert_allclose(added, x + summed, rtol=1e-5, atol=1e-6)


def test_adding_a_window_rounds_once(order, rows):
    """In bf16: not the sum of a rounded sum."""
    onto, y = (jnp.asarray(value, jnp.bfloat16) for value in rows)
    exact = combine_window(y.astype(jnp.float32), order, K, 0) + onto.astype(jnp.float32)
    found = add_window(onto, y, order, K, 0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
    assert (found != onto + combine_window(y, order, K, 0)).any()


def test_windows_of_everything_are_the_full_functions(order, rows):
    x, y = (jnp.asarray(value, jnp.float32) for value in rows)
    np.testing.assert_array_equal(
        dispatch_window(x, order, K, 0, TOKENS * K), dispatch(x, order, K)
    )
    np.testing.assert_array_equal(combine_window(y, order, K, 0), combine(y, order, K))


@pytest.mark.parametrize("start", STARTS)
def test_windows_are_each_others_transpose(local_order, rows, start):
    """<window(x), y> = <x, transpose(y)>, and each derivative is the other function."""
    x, y = jnp.asarray(rows[0], jnp.float32), jnp.asarray(rows[1][:CAPACITY], jnp.float32)
    sent, pull_dispatch = jax.vjp(lambda x: dispatch_window(x, local_order, K, start, CAPACITY), x)
    back, pull_combine = jax.vjp(lambda y: combine_window(y, local_order, K, start), y)
    np.testing.assert_array_equal(pull_dispatch(y)[0], back)
    np.testing.assert_array_equal(pull_combine(x)[0], sent)
    np.testing.assert_allclose((sent * y).sum(), (x * back).sum(), rtol=1e-5)


def test_window_sizes():
    sizes = [
        window_sizes(jnp.array([6, 0, 5], jnp.int32), jnp.int32(start), CAPACITY).tolist()
        for start in STARTS
    ]
    assert sizes == [[4, 0, 0], [2, 0, 2], [0, 0, 3], [0, 0, 0]]


def test_windows_do_not_scatter(local_order, rows):
    x = jnp.asarray(rows[0], jnp.float32)

    def there_and_back(x):
        sent = jnp.tanh(dispatch_window(x, local_order, K, 4, CAPACITY))
        return (combine_window(sent, local_order, K, 4) ** 2).sum()

    names = {e.primitive.name for e in all_equations(jax.make_jaxpr(jax.grad(there_and_back))(x))}
    assert "gather" in names
    assert not any(name.startswith("scatter") for name in names)
