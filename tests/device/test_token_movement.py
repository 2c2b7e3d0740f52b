"""The Hopper kernels that move tokens against gathers, at K2's width, on a GPU.

Not run by CI, which has none. On a machine with a Hopper GPU: `pytest tests/device`, or without
pytest `python tests/device/test_token_movement.py`.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[2]))

from kimi_jax.kernels import token_movement as movement

try:
    import pytest
except ImportError:  # run as a script
    pytest = None

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


def run_windows(case):
    """Every window, until one that is empty: the same bits as by gathers, also the derivatives."""
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
            ours = jnp.arange(capacity) < order.group_sizes.sum() - start
            y = jnp.where(ours[:, None], sent, jnp.nan)
            summed, pull_summed = jax.vjp(lambda y, back=back: jax.jit(back)(y, order), y)
            results.append((sent, summed, *pull_sent(sent), *pull_summed(x)))
        for gathered, moved in zip(*results, strict=True):
            assert bool(jnp.isfinite(moved).all())
            assert bool((gathered == moved).all())


def run_full(case):
    """`dispatch` and the derivative of `combine`."""
    tokens, experts, _, _ = CASES[case]
    x, chosen = draw(tokens, experts)
    order = movement.sort_by_expert(chosen, experts)
    dispatch = jax.jit(movement.dispatch, static_argnums=(2, 3))
    sent = [dispatch(x, order, K, impl) for impl in IMPLEMENTATIONS]
    assert bool((sent[0] == sent[1]).all())
    for impl in IMPLEMENTATIONS:
        _, pullback = jax.vjp(lambda y, impl=impl: movement.combine(y, order, K, impl), sent[0])
        assert bool((pullback(x)[0] == sent[0]).all())


if pytest is not None:
    on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

    @on_gpu
    @pytest.mark.parametrize("case", CASES)
    def test_windows(case):
        run_windows(case)

    @on_gpu
    def test_full():
        run_full("everything")


def main():
    failures = 0
    runs = [(case, partial(run_windows, case)) for case in CASES]
    for name, run in [*runs, ("full", partial(run_full, "everything"))]:
        try:
            run()
            print("passed:", name, flush=True)
        except Exception as error:
            failures += 1
            print("FAILED:", name, "|", type(error).__name__, str(error)[:300], flush=True)
    raise SystemExit(failures)


if __name__ == "__main__":
    main()
