"""Weights that ranks keep in parts, whole on each of them for as long as a generation lasts."""

import logging
from functools import cache

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from kimi_jax.model.transformer import ModelDef, Values
from kimi_jax.parallel import processes

log = logging.getLogger(__name__)

MARGIN = 2 << 30  # bytes that stay free for what decoding needs beside its caches


def gathered(model_def: ModelDef, base: Values, caches: int = 0) -> tuple[ModelDef, Values]:
    """The model with its weights gathered once, where decoding would gather them for every token.

    Experts and vocabulary stay where they are. If a device has no memory left for the rest, everything
    does, and that is logged.

    Args:
        model_def: the model's structure.
        base: its weights.
        caches: bytes that decoding needs beside them on every device.
    """
    if model_def.settings.ranks.mesh is None:
        return model_def, base
    whole = model_def.with_whole_rest
    moved = [path for path, spec in whole.base_specs.items() if spec != model_def.base_specs[path]]
    if not moved:
        return model_def, base
    moved.sort(key=lambda path: -base[path].nbytes)
    # One after the other, each received beside its place first: the last are small.
    needed = sum(base[path].nbytes for path in moved) + base[moved[-1]].nbytes + caches + MARGIN
    free = _free()
    short = free is not None and free < needed
    if processes.largest_soon(int(short))():  # all processes do the same
        log.warning(
            "decoding gathers weights for every token: whole they need %.1f GiB a device, and %s; "
            "mesh.rest=replicated keeps them whole",
            needed / 2**30,
            "another process has less" if free is None else f"{free / 2**30:.1f} GiB are free",
        )
        return model_def, base
    copies = {}
    for path in moved:
        place = whole.settings.ranks.sharding(whole.base_specs[path])
        copies[path] = jax.block_until_ready(_copy_to(place)(base[path]))
    return whole, {**base, **copies}


@cache
def _copy_to(place: NamedSharding | None) -> "jax.stages.Wrapped":
    def same(value: Array) -> Array:
        return value

    return jax.jit(same, out_shardings=place)


def _free() -> int | None:
    """Bytes that JAX could still take on the fullest of this process's devices; None on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in found for found in stats):
        return None
    return min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
