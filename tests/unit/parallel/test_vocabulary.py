"""Embeddings whose table is spread over ranks."""

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks
from kimi_jax.parallel.vocabulary import look_up

VOCABULARY, WIDTH, RANKS = 32, 4, 8


@pytest.fixture
def table():
    return jnp.arange(1.0, VOCABULARY * WIDTH + 1).reshape(VOCABULARY, WIDTH)


def test_one_device_takes_rows_of_the_table(table):
    ids = jnp.array([0, 5, 31, 5])
    np.testing.assert_array_equal(look_up(ONE_DEVICE, table, ids, jnp.float32), table[ids])


def test_a_rank_alone_finds_every_id_once(table):
    """A row of zeros would reach the norms, whose derivative there is 1/√eps, layer upon layer."""
    part = table[: VOCABULARY // RANKS]
    ids = jnp.arange(VOCABULARY)
    found = look_up(Ranks(RANKS, alone=True), part, ids, jnp.float32)
    np.testing.assert_array_equal(found, part[ids % len(part)])
