"""The device mesh: `expert`, which carries rows and experts within a node, and `data` across nodes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from kimi_jax.errors import UserError

DATA, EXPERT = "data", "expert"
AXES = (DATA, EXPERT)


def make_mesh(expert: int, data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` × `expert` devices; neighbours, of one node, share the experts.

    Args:
        expert: devices that share the experts and everything else of one replica.
        data: replicas.
        devices: JAX devices to choose from, in order; the first of them are taken. None: all that JAX sees.

    Raises:
        UserError: fewer devices than asked for, or devices of several processes of which some would
            stand idle.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = data * expert
    arithmetic = f"mesh.data × mesh.expert = {data} × {expert} = {wanted} devices are asked for"
    if wanted > len(devices):
        raise UserError(
            f"{arithmetic}; found {len(devices)} ({devices[0].device_kind}). Set mesh.expert and "
            "mesh.data so that their product is at most that, or start more processes"
        )
    if wanted < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"{arithmetic}; the processes together have {len(devices)}, and each process must take "
            "part: set mesh.expert and mesh.data so that their product is that"
        )
    grid = np.asarray(devices[:wanted]).reshape(data, expert)
    # Auto: outside of shard_map, in the optimizer's update, the compiler follows the arrays.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
