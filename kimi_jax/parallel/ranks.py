"""One rank's view of the others: every exchange of data between devices is a method of `Ranks`.

Model code runs inside `jax.shard_map` on one rank's rows and one rank's part of the weights. Losses
are each rank's share of a sum, so the transposes of these exchanges, which JAX takes, give exactly
the gradient of the whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from kimi_jax.config import MeshSection, Rest
from kimi_jax.parallel.mesh import AXES, DATA, EXPERT, make_mesh

BUFFER_MULTIPLE = 128  # rows of an expert buffer, for the kernels' tiles


@dataclass(frozen=True)
class Ranks:
    """How many ranks share the work, and how.

    Attributes:
        expert: ranks that share experts, vocabulary and, if `rest` is sharded, all other weights.
        data: replicas of those.
        mesh: the devices; None on one device.
        alone: one of `expert` ranks on one device, for measuring: what it would receive is made of
            copies of its own data, of the same shapes. Its numbers mean nothing.
        rest: whether weights that are not experts' are stored in parts and gathered at each use.
        buffer: rows of an expert buffer, as a multiple of the mean rank's assignments. More rows than
            that are computed in further passes; none are dropped.
        rows: `split`, each rank has rows of its own, or `whole`, all ranks have the same rows.
    """

    expert: int = 1
    data: int = 1
    mesh: Mesh | None = None
    alone: bool = False
    rest: Rest = "sharded"
    buffer: float = 1.5
    rows: Literal["split", "whole"] = "split"

    def __post_init__(self) -> None:
        assert (self.mesh is not None) == (self.expert * self.data > 1 and not self.alone)
        assert self.buffer > 0

    @property
    def whole_rows(self) -> "Ranks":
        """The same ranks, all of them with the same rows: for decoding."""
        return replace(self, rows="whole")

    @property
    def count(self) -> int:
        """Ranks in all; each has rows of its own."""
        return self.expert * self.data

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Mesh axes and their sizes, whether or not there is a mesh."""
        return {DATA: self.data, EXPERT: self.expert}

    def run(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`function` of each rank's parts as a function of global arrays; on one device, itself."""
        if self.mesh is None:
            return function
        # check_vma does not know what Pallas kernels return; what is summed is written out instead.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        """Where an array of this spec lives; None: on the one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def put(self, values: Any, spec: PartitionSpec) -> Array:
        """Values that every process has, as an array of this spec; alone, this rank's part of them."""
        if self.alone:
            part = tuple(
                slice(size // self.expert) if EXPERT in _names(names) else slice(size)
                for size, names in zip(values.shape, spec, strict=False)
            )
            values = values[part]
        if self.mesh is None:
            return jnp.asarray(values)
        host = np.asarray(values)
        return jax.make_array_from_callback(
            host.shape, NamedSharding(self.mesh, spec), lambda index: host[index]
        )

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """A batch's fields [micro-batches, B, T], of which each rank gets its rows."""
        return {key: self.put(value, MICRO_BATCHES) for key, value in batch.items()}

    def agreed(self, x: Array) -> Array:
        """The first rank's `x`, for what decides how long a loop with exchanges in it goes on."""
        if self.mesh is None:
            return x
        first = sum(jax.lax.axis_index(axis) for axis in AXES) == 0
        return jax.lax.psum(jnp.where(first, x, 0), AXES)

    def index(self) -> Array | int:
        """This rank's number among those that share the experts."""
        return 0 if self._single else jax.lax.axis_index(EXPERT)

    def gather(self, x: Array) -> Array:
        """Every expert rank's `x`, one after the other along the first dimension."""
        if self.expert == 1:
            return x
        if self.alone:
            return jnp.tile(x, (self.expert, *[1] * (x.ndim - 1)))
        return jax.lax.all_gather(x, EXPERT, tiled=True)

    def gather_weight(self, weight: Array) -> Array:
        """Every expert rank's rows of a weight [out, in].

        Alone, the copies are turned against each other, so that no two rows are equal: a router with
        equal rows would send each token to all copies of one expert.
        """
        if not self.alone or self.expert == 1:
            return self.gather(weight)
        return jnp.concatenate([jnp.roll(weight, n, axis=-1) for n in range(self.expert)])

    def scatter_sum(self, x: Array) -> Array:
        """The sum over expert ranks, of which each keeps its part of the first dimension."""
        if self.expert == 1:
            return x
        if self.alone:
            return x.reshape(self.expert, -1, *x.shape[1:]).sum(axis=0, dtype=x.dtype)
        return jax.lax.psum_scatter(x, EXPERT, tiled=True)

    def gather_last(self, x: Array) -> Array:
        """Every expert rank's `x`, one after the other along the last dimension."""
        if self.expert == 1:
            return x
        if self.alone:
            return jnp.tile(x, self.expert)
        return jax.lax.all_gather(x, EXPERT, axis=x.ndim - 1, tiled=True)

    def gather_rows(self, x: Array) -> Array:
        """What every rank needs to see for its experts: all rows, wherever they live."""
        return x if self.rows == "whole" else self.gather(x)

    def return_rows(self, partial: Array) -> Array:
        """The sum of the ranks' contributions to all rows, back to the ranks that have them."""
        return self.sum(partial) if self.rows == "whole" else self.scatter_sum(partial)

    def sum(self, x: Any) -> Any:
        """Sum over expert ranks, of a tree."""
        return x if self._single else jax.lax.psum(x, EXPERT)

    def sum_where_replicated(self, x: Array, spec: PartitionSpec) -> Array:
        """Sum over the mesh axes over which an array of this spec is replicated."""
        if self.mesh is None:
            return x
        used = {name for names in spec for name in _names(names)}
        axes = tuple(axis for axis in AXES if axis not in used and self.mesh.shape[axis] > 1)
        return jax.lax.psum(x, axes) if axes else x

    def buffer_rows(self, assignments: int) -> int:
        """Rows of the static buffer for this rank's part of `assignments` of all ranks."""
        mean = assignments / self.expert
        rows = -(-int(self.buffer * mean) // BUFFER_MULTIPLE) * BUFFER_MULTIPLE
        return assignments if self.expert == 1 else min(max(rows, BUFFER_MULTIPLE), assignments)

    @property
    def _single(self) -> bool:
        return self.mesh is None or self.expert == 1


REPLICATED = PartitionSpec()
MICRO_BATCHES = PartitionSpec(None, AXES)
"""Of a batch's fields [micro-batches, B, T]: rows are spread over all ranks."""
ONE_DEVICE = Ranks()


def make_ranks(settings: MeshSection, devices: Sequence[Any] | None = None) -> Ranks:
    """The ranks that a configuration asks for, on `devices`; None: on those that JAX sees.

    Raises:
        UserError: see `kimi_jax.parallel.mesh.make_mesh`.
    """
    without = abstract_ranks(settings)
    if not without.alone:
        return without
    return replace(without, mesh=make_mesh(settings.expert, settings.data, devices), alone=False)


def abstract_ranks(settings: MeshSection) -> Ranks:
    """The same without their devices: one of them alone."""
    return Ranks(
        settings.expert,
        settings.data,
        alone=settings.expert * settings.data > 1,
        rest=settings.rest,
        buffer=settings.expert_buffer,
    )


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
