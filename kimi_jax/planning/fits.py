"""Refuses a run that cannot fit, before a weight is read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kimi_jax.config import RunConfig
from kimi_jax.errors import UserError, listing
from kimi_jax.memory_settings import (
    ADVISED_FRACTION,
    DEFAULT_FRACTION,
    FRACTION_SETTING,
    HOST_SETTING,
    allowed_host_memory,
    host_memory,
)
from kimi_jax.model.config import ModelConfig
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.planning.activations import offloaded
from kimi_jax.planning.memory import Item, Sizing, sizing_of

GIB = 2**30
# What stands from step to step and is known exactly, whatever computes the step.
STANDING = ("weights", "training")


def device_memory(devices: Sequence[Any]) -> int | None:
    """Bytes that JAX may use on each device, the least of them; None if one does not say (CPUs)."""
    stats = [device.memory_stats() for device in devices]
    limits = [found["bytes_limit"] for found in stats if found and "bytes_limit" in found]
    return min(limits) if limits and len(limits) == len(stats) else None


def check_fits(
    config: RunConfig,
    model: ModelConfig,
    ranks: Ranks,
    memory: int | None,
    local: int = 1,
    processes: int = 1,
) -> None:
    """Compares the plan of a run with the memory there is.

    Args:
        config: of the run.
        model: the checkpoint's.
        ranks: of the run.
        memory: bytes that JAX may use on each device, see `device_memory`. None, on CPUs: what stands
            from step to step is compared with the machine's memory. Workspace is left out there, for
            its plan is that of GPUs.
        local: devices of this process, which share a CPU's memory.
        processes: of this run on this machine, each with as many.

    Raises:
        UserError: it cannot fit; the message has the numbers, and what to change.
    """
    sizing = replace(sizing_of(config, model), ranks=ranks)
    items = sizing.items()
    if memory is None:
        items = tuple(item for item in items if item.kind in STANDING)
        items = tuple(replace(item, bytes=item.bytes * local * processes) for item in items)
        memory, whose = host_memory(), "this machine has"
    else:
        _check_host(sizing, local, processes)
        items = tuple(item for item in items if item.kind != "reserve")
        whose = "JAX may use on each device"
    needed = sum(item.bytes for item in items)
    if needed > memory:
        raise UserError(_message(sizing, items, needed, memory, whose))


def _check_host(sizing: Sizing, local: int, processes: int) -> None:
    """Refuses more in the host's memory than there is, or than JAX may use in one process."""
    devices = local * processes
    kept = {name: devices * size for name, size in offloaded(sizing.work).items()}
    needed, there, allowed = sum(kept.values()), host_memory(), allowed_host_memory()
    if needed > there or needed > allowed * processes:
        raise UserError(
            listing(
                f"The run cannot fit: {devices} devices would keep {needed / GIB:,.1f} GiB in the memory "
                f"of this machine, which has {there / GIB:,.1f} GiB, and JAX may use "
                f"{allowed / GIB:,.1f} GiB of it in each process",
                [f"train.offload, {name}: {size / GIB:,.1f} GiB" for name, size in kept.items()],
                "Name less in train.offload, make train.micro_batch smaller, or, if the machine has "
                f"more, set {HOST_SETTING} in the environment.",
            )
        )


def _message(sizing: Sizing, items: Sequence[Item], needed: int, memory: int, whose: str) -> str:
    lines = [f"{item.name}: {item.bytes / GIB:,.2f} GiB" for item in items if item.bytes]
    return listing(
        f"The run cannot fit: planned {needed / GIB:,.1f} GiB, and {whose} {memory / GIB:,.1f} GiB",
        lines,
        "What would make it smaller: " + "; ".join(_remedies(sizing, memory)),
    )


def _remedies(sizing: Sizing, memory: int) -> list[str]:
    """Changes that this run has not made yet; each with what it would come to."""
    found = []
    config, ranks = sizing.config, sizing.ranks

    def add(change: str, changed: Sizing) -> None:
        items = [item for item in changed.items() if item.kind != "reserve"]
        needed = sum(item.bytes for item in items)
        found.append(f"{change} ({needed / GIB:,.1f} GiB a device)")

    if (rows := sizing.largest_rows(memory)) and rows < sizing.rows:
        add(f"train.micro_batch={rows * ranks.count}", replace(sizing, rows=rows))
    elif sizing.rows > 1:
        add(f"train.micro_batch={ranks.count}", replace(sizing, rows=1))
    if config.train.recompute == "none":
        train = config.train.model_copy(update={"recompute": "layer"})
        add("train.recompute=layer", replace(sizing, config=_with(config, train=train)))
    if config.train.keep:
        train = config.train.model_copy(update={"keep": []})
        add("train.keep=[], or less of it", replace(sizing, config=_with(config, train=train)))
    if ranks.expert > 1 and ranks.rest == "replicated":
        add("mesh.rest=sharded", replace(sizing, ranks=replace(ranks, rest="sharded")))
    if config.lora.expert_factors == "per_expert" and config.lora.routed_rank > 1:
        found.append("a smaller lora.expert_rank, or lora.expert_factors=shared")
    found.append("more devices (mesh.expert)")
    found.append(
        f"if JAX may use less than the device has: {FRACTION_SETTING}={ADVISED_FRACTION} in the "
        f"environment (JAX's own default is {DEFAULT_FRACTION})"
    )
    return found


def _with(config: RunConfig, **sections: Any) -> RunConfig:
    return config.model_copy(update=sections)
