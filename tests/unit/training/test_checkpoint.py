"""Checkpoints of a run that lie damaged on disk."""

import jax.numpy as jnp
import pytest

from kimi_jax.errors import UserError
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.step import TrainState


def state(step):
    factors = {"lm_head.lora_A": jnp.arange(8.0).reshape(2, 4)}
    return TrainState(factors, {"mu": jnp.ones((2, 4))}, jnp.int32(step))


def test_a_damaged_checkpoint_is_named(tmp_path):
    """Guards against Orbax's traceback, and against starting afresh in silence."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(3), {"position": 1})
    damaged = [path for path in (tmp_path / "checkpoints/3/adapters").rglob("*") if path.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        with pytest.raises(UserError, match=r"checkpoints/3: this checkpoint cannot be read"):
            checkpoints.restore(state(0))
