"""Everything that `tools/bench_load.py` measures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from kimi_jax.parallel.ranks import Ranks
from kimi_jax.weights import load
from kimi_jax.weights.checkpoint import Checkpoint, open_checkpoint
from kimi_jax.weights.reading import cores
from tools.load_bench import raw
from tools.load_bench.imports import (
    TIMES,
    parts_of_an_import,
    steps_of_an_import,
    timed_blocks,
    timed_import,
)
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
    reasons: bool = False,
) -> None:
    """Imports and raw reading, in the order of `pages`.

    Args:
        directory: of the checkpoint.
        ranks: where it is imported to.
        say: told each line when it is in `result`.
        result: gets what was measured.
        pages: `cold`, `warm` or both.
        reasons: of warm imports also what limits them.
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
        "cores": cores(),
        "settings": {name: getattr(load, name) for name in (*TUNED, "AHEAD")},
    }
    devices = jax.local_devices()[: ranks.count]
    link = None
    if devices[0].platform == "gpu":
        link = result["link_gb_s"] = link_rate(devices)
    for name in pages:
        one = _cold if name == "cold" else _warm
        rates, seconds, memory = one(checkpoint, ranks, files, size)
        result[name] = _ratios(rates, size / 1e9 / seconds, link)
        result[name] |= {"import_seconds": round(seconds, 2), "beyond_baseline": memory}
        say(f"{name}: {json.dumps(result[name])}")
    if reasons and "warm" in pages:
        found: dict[str, Any] = {"parts": parts_of_an_import(checkpoint, ranks, size)}
        result["reasons"] = found
        seconds = median(timed_blocks(files) for _ in range(TIMES))
        found["blocks sent"] = {"gb_s": round(size / 1e9 / seconds, 2)}
        found["steps"] = steps_of_an_import(checkpoint, ranks)
        if link is not None:
            found["beside_transfers"] = raw.read_beside_transfers(files, size, devices)
        say(f"reasons: {json.dumps(found)}")


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
    return rates, seconds, memory


def _warm(
    checkpoint: Checkpoint, ranks: Ranks, files: list[Path], size: int
) -> tuple[Rates, float, dict[str, Any]]:
    """Memory is watched in an import of its own, the first: it compiles, and watching costs time."""
    memory: dict[str, Any] = {}
    with memory_watched(memory):
        timed_import(checkpoint, ranks)

    cases = [(threads, mib) for mib in raw.BLOCKS_MIB for threads in raw.THREADS]
    rates = {case: size / 1e9 / raw.read_raw(files, case[0], case[1] << 20) for case in cases}
    return rates, median(timed_import(checkpoint, ranks) for _ in range(TIMES)), memory


def _ratios(rates: Rates, rate: float, link: float | None) -> dict[str, Any]:
    fastest = max(rates.values())
    by_block = {
        block: max(r for (_, mib), r in rates.items() if mib == block) for _, block in rates
    }
    return {
        "raw_gb_s": {f"{n} × {mib} MiB": round(r, 2) for (n, mib), r in rates.items()},
        "import_gb_s": round(rate, 2),
        "of_raw": round(rate / fastest, 2),
        "of_slower_of_raw_and_link": round(rate / min(fastest, link or fastest), 2),
        "of_raw_in_blocks_of_mib": {mib: round(rate / r, 2) for mib, r in by_block.items()},
    }
