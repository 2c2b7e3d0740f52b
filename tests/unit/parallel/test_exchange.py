"""Rows between ranks: the same values and derivatives in both ways, and what each sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kimi_jax.config import MeshSection
from kimi_jax.parallel.ranks import make_ranks

RANKS, ROWS, WIDTH = 4, 32, 8


def there_and_back(way):
    """Rows to all ranks, changed there as each rank does, and summed where they came from."""
    ranks = make_ranks(MeshSection(expert=RANKS, exchange=way), jax.devices()[:RANKS])

    def run(x_ND):
        factor = 1 + jax.lax.axis_index("expert")
        return ranks.scatter_sum(jnp.sin(factor * ranks.gather(x_ND)))

    return ranks.run(run, (P("expert"),), P("expert"))


@pytest.mark.parametrize("way", ["sums", "copies"])
def test_values_and_derivatives(way):
    """Against the same arithmetic on one device; fp32 sums of four in another order."""
    rng = np.random.default_rng(0)
    x, dy = jnp.asarray(rng.standard_normal((2, ROWS, WIDTH)), jnp.float32)
    wanted, pull_back = jax.vjp(lambda x: sum(jnp.sin(n * x) for n in range(1, RANKS + 1)), x)
    found, pull_back_found = jax.vjp(jax.jit(there_and_back(way)), x)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(pull_back_found(dy)[0], pull_back(dy)[0], atol=2e-6)


def test_copies_sum_on_arrival_in_fp32():
    """Parts of 1, 2⁻⁹, 2⁻⁹ and 2⁻⁹: added one by one in bf16 they stay 1."""
    ranks = make_ranks(MeshSection(expert=RANKS, exchange="copies"), jax.devices()[:RANKS])

    def run(parts):
        return ranks.scatter_sum(jnp.broadcast_to(parts, (RANKS, WIDTH)).astype(jnp.bfloat16))

    parts = jnp.asarray([[1.0], [2**-9], [2**-9], [2**-9]])
    found = jax.jit(ranks.run(run, (P("expert"),), P("expert")))(parts)
    assert (found == jnp.bfloat16(1 + 2**-7)).all()


@pytest.mark.parametrize(("way", "adds"), [("sums", True), ("copies", False)])
def test_what_is_sent(way, adds):
    """Copies alone, also backwards: what adds on the way would wait for a GPU's multiprocessors."""
    function = there_and_back(way)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    both = jax.jit(lambda x: jax.vjp(function, x)[1](x)).lower(x).as_text()
    assert ("reduce_scatter" in both) == adds
    assert ("all_to_all" in both) != adds
