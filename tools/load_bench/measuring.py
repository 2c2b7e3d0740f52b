"""Everything that `tools/bench_load.py` measures."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from kimi_jax.parallel.ranks import Ranks
from kimi_jax.weights import load
from kimi_jax.weights.checkpoint import Checkpoint, open_checkpoint
from tools.load_bench import raw
from tools.load_bench.imports import TIMES, parts_of_an_import, timed_import
from tools.load_bench.memory import memory_watched
from tools.load_bench.transfers import link_rate

PAGES = ("cold", "warm")
TUNED = ("READERS", "BUFFERS", "PIECE_BYTES", "SHARE_BYTES", "TOGETHER")


def measure(
    directory: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    result: dict[str, Any],
    pages: Sequence[str] = PAGES,
) -> None:
    """Everything, in the order of `pages`.

    Args:
        directory: of the checkpoint.
        ranks: where it is imported to.
        say: told each of the two when it is in `result`.
        result: gets what was measured.
        pages: `cold`, `warm` or both.
    """
    checkpoint = open_checkpoint(directory)
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    size = sum(path.stat().st_size for path in files)
    for device in jax.local_devices():  # a device's own start is not the import's
        jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device) + 1)
    result |= {
        "gb": round(size / 1e9, 2),
        "files": len(files),
        "tensors": len(checkpoint.tensors),
        "layers": checkpoint.config.num_hidden_layers,
        "experts": checkpoint.config.n_routed_experts,
        "hidden": checkpoint.config.hidden_size,
        "devices": f"{ranks.count} × {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "settings": {name: getattr(load, name) for name in TUNED},
    }
    devices = jax.local_devices()[: ranks.count]
    link = None
    if devices[0].platform == "gpu":
        link = result["link_gb_s"] = link_rate(devices)
    for name in pages:
        one = _cold if name == "cold" else _warm
        rates, seconds, more = one(checkpoint, ranks, files, size)
        result[name] = _ratios(rates, size / 1e9 / seconds, link) | more
        result[name]["import_seconds"] = round(seconds, 2)
        if name == "warm" and link is not None:
            result[name]["beside_transfers"] = raw.read_beside_transfers(files, size, devices)
        say(f"{name}: {json.dumps(result[name])}")


def use(text: str) -> None:
    """Settings of the import: readers, buffers, MiB of a piece, MiB of a share, pieces of a program."""
    readers, buffers, piece, share, together = (int(number) for number in text.split(","))
    values = (readers, buffers, piece << 20, share << 20, together)
    for name, value in zip(TUNED, values, strict=True):
        setattr(load, name, value)


Rates = dict[tuple[int, int], float]  # GB/s by threads and MiB of a block


def _cold(
    checkpoint: Checkpoint, ranks: Ranks, files: list[Path], size: int
) -> tuple[Rates, float, dict[str, Any]]:
    threads, mib = raw.ONE
    raw.drop_pages(files)
    rates: Rates = {raw.ONE: size / 1e9 / raw.read_raw(files, threads, mib << 20)}
    raw.drop_pages(files)
    memory: dict[str, Any] = {}
    with memory_watched(memory):
        seconds = timed_import(checkpoint, ranks)
    return rates, seconds, {"beyond_baseline": memory}


def _warm(
    checkpoint: Checkpoint, ranks: Ranks, files: list[Path], size: int
) -> tuple[Rates, float, dict[str, Any]]:
    """Memory is watched in an import of its own, the first: it compiles, and watching costs time."""
    memory: dict[str, Any] = {}
    with memory_watched(memory):
        timed_import(checkpoint, ranks)

    def rate(threads: int, mib: int, displaced: int = 0) -> float:
        return size / 1e9 / raw.read_raw(files, threads, mib << 20, displaced)

    cases = [(threads, mib) for mib in raw.BLOCKS_MIB for threads in raw.THREADS]
    rates = {case: rate(*case) for case in cases}
    seconds = median(timed_import(checkpoint, ranks) for _ in range(TIMES))
    displaced = {(raw.ONE[0], mib): rate(raw.ONE[0], mib, raw.DISPLACED) for mib in raw.BLOCKS_MIB}
    more = {
        "beyond_baseline": memory,
        "parts": parts_of_an_import(checkpoint, ranks, size),
        "displaced_gb_s": _named(displaced),
    }
    return rates, seconds, more


def _ratios(rates: Rates, rate: float, link: float | None) -> dict[str, Any]:
    fastest = max(rates.values())
    by_block = {
        block: max(r for (_, mib), r in rates.items() if mib == block) for _, block in rates
    }
    return {
        "raw_gb_s": _named(rates),
        "import_gb_s": round(rate, 2),
        "of_raw": round(rate / fastest, 2),
        "of_slower_of_raw_and_link": round(rate / min(fastest, link or fastest), 2),
        "of_raw_in_blocks_of_mib": {mib: round(rate / r, 2) for mib, r in by_block.items()},
    }


def _named(rates: Rates) -> dict[str, float]:
    return {f"{threads} × {mib} MiB": round(rate, 2) for (threads, mib), rate in rates.items()}
