"""Checkpoints of a run: restored on other meshes, and found damaged on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kimi_jax.errors import UserError
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import REPLICATED, Ranks
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


MESHES = {"8": (8, 1), "4x2": (4, 2), "2": (2, 1), "1": None}


def spread_state(mesh, values):
    """A state on a mesh: experts' factors spread over it, the others on every device."""
    ranks = Ranks() if mesh is None else Ranks(*mesh, make_mesh(*mesh))
    experts, whole = values
    specs = {"experts": PartitionSpec(None, "expert"), "whole": REPLICATED}
    factors = {
        "experts": ranks.put(experts, specs["experts"]),
        "whole": ranks.put(whole, specs["whole"]),
    }
    moments = {
        name: ranks.put(2 * np.asarray(value), specs[name]) for name, value in factors.items()
    }
    state = TrainState(factors, {"mu": moments}, ranks.put(np.int32(3), REPLICATED))
    return state, {name: ranks.sharding(spec) for name, spec in specs.items()}


@pytest.mark.parametrize("saved", MESHES)
def test_a_checkpoint_belongs_to_no_mesh(tmp_path, saved):
    """Saved anywhere, restored everywhere: the values bit for bit, in the places of this mesh."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16, 3), (5, 3))]
    before, _ = spread_state(MESHES[saved], values)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(before, {"position": 1})
    for mesh in MESHES.values():
        like, shardings = spread_state(mesh, [0 * value for value in values])
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            restored, data = checkpoints.restore(like)
            shapes = {name: value.shape for name, value in before.adapters.items()}
            given = None if mesh is None else shardings
            alone = checkpoints.restore_adapters(shapes, given)
        assert data == {"position": 1}
        for found, place, expected in zip(
            jax.tree.leaves(restored), jax.tree.leaves(like), jax.tree.leaves(before), strict=True
        ):
            assert np.array_equal(found, expected)
            assert found.sharding.is_equivalent_to(place.sharding, found.ndim)
        for name, value in alone.items():
            assert np.array_equal(value, before.adapters[name])
            assert len(value.sharding.device_set) == (1 if mesh is None else mesh[0] * mesh[1])
