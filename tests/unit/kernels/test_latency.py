"""What XLA's scheduler is told of a kernel."""

import jax
import jax.numpy as jnp
import pytest

from kimi_jax.kernels.latency import BYTES, OPERATIONS, expected


@pytest.mark.parametrize(
    ("work", "nanoseconds"),
    [
        ({"operations": OPERATIONS / 1000}, 1_000_000),
        ({"moved": BYTES / 1000}, 1_000_000),
        ({"operations": OPERATIONS / 1000, "moved": BYTES / 500}, 2_000_000),
    ],
)
def test_a_call_says_what_it_takes(work, nanoseconds):
    """The larger of the two, on the call itself, within a jitted function too."""
    kernel = expected(jax.jit(jnp.sin), **work)
    text = jax.jit(lambda x: kernel(x) + 1).lower(jnp.ones(3)).as_text()
    told = f'latency_metadata = "{nanoseconds}"'
    assert told in text
    assert all("add" not in line for line in text.splitlines() if told in line)


def test_nothing_known_is_nothing_said():
    """Zero nanoseconds would be taken at its word."""
    kernel = expected(jax.jit(jnp.sin))
    assert "latency_metadata" not in jax.jit(kernel).lower(jnp.ones(3)).as_text()
