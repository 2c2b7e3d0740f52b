"""The Hopper kernels that move tokens against gathers, at K2's width, on a GPU.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`.
"""

import jax
import jax.numpy as jnp
import pytest

from kimi_jax.kernels import token_movement as movement
from kimi_jax.kernels.token_movement.scatter import CLEARED
from tests.device import needs

pytestmark = needs.a_hopper_gpu

WIDTH, K = 7168, 8
IMPLEMENTATIONS = ("gather", "pallas")
# tokens, all experts, experts here, capacity
CASES = {
    "everything": (1000, 384, 384, 8000),
    "one of eight": (4096, 384, 48, 2048),
    "fewer tokens than blocks": (5, 16, 16, 40),
    "nobody's": (300, 384, 0, 64),
}


def draw(tokens, experts):
    x = jax.random.normal(jax.random.key(0), (tokens, WIDTH), jnp.bfloat16)
    scores = jax.random.uniform(jax.random.key(1), (tokens, experts))
    return x, jax.lax.top_k(scores, K)[1].astype(jnp.int32)


@pytest.mark.parametrize("case", CASES)
def test_windows(case):
    """Every window, until one that is empty: the same bits as by gathers, also the derivatives.

    Of rows that are nobody's, as many as kernels may read.
    """
    tokens, experts, here, capacity = CASES[case]
    x, chosen = draw(tokens, experts)
    order = movement.sort_by_expert(chosen, here, 3 if here < experts else 0)
    for start in range(0, int(order.group_sizes.sum()) + 2 * capacity, capacity):
        results = []
        for impl in IMPLEMENTATIONS:

            def there(x, order, impl=impl, start=start):
                return movement.dispatch_window(x, order, K, start, capacity, impl)

            def back(y, order, impl=impl, start=start):
                return movement.combine_window(y, order, K, start, impl)

            sent, pull_sent = jax.vjp(lambda x, there=there: jax.jit(there)(x, order), x)
            # What is nobody's may hold anything.
            end = max(0, int(order.group_sizes.sum()) - start)
            ours = jnp.arange(capacity) < end
            y = jnp.where(ours[:, None], sent, jnp.nan)
            summed, pull_summed = jax.vjp(lambda y, back=back: jax.jit(back)(y, order), y)
            rows, (d_rows,) = sent[: end + CLEARED], pull_summed(x)

            def add(onto, y, order, impl=impl, start=start):
                return movement.add_window(onto, y, order, K, start, impl)

            added = jax.jit(add)(x, y, order)
            results.append((rows, summed, *pull_sent(y), d_rows[: end + CLEARED], added))
        for gathered, moved in zip(*results, strict=True):
            assert bool(jnp.isfinite(moved).all())
            assert bool((gathered == moved).all())


def test_full():
    """`dispatch` and the derivative of `combine`."""
    tokens, experts, _, _ = CASES["everything"]
    x, chosen = draw(tokens, experts)
    order = movement.sort_by_expert(chosen, experts)
    dispatch = jax.jit(movement.dispatch, static_argnums=(2, 3))
    sent = [dispatch(x, order, K, impl) for impl in IMPLEMENTATIONS]
    assert bool((sent[0] == sent[1]).all())
    for impl in IMPLEMENTATIONS:
        _, pullback = jax.vjp(lambda y, impl=impl: movement.combine(y, order, K, impl), sent[0])
        assert bool((pullback(x)[0] == sent[0]).all())
