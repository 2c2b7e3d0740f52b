"""Measures an import against reading the same files raw, cold and warm, and the host memory it takes.

    python tools/bench_load.py --gib 30 --directory DIR [--expert N] [--json FILE]

Also, what the way to the device can carry: memory that a GPU reads by itself, copied to it by four
threads. An import cannot be faster than the slower of the two.

Makes the checkpoint if the directory has none (see synthetic_checkpoint.py). Raw: threads read the
files in order, in blocks, into buffers that they use again. Cold: the files' pages are dropped from the
page cache before. GB are 10⁹ bytes.
"""

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks
from kimi_jax.weights import load
from kimi_jax.weights.checkpoint import Checkpoint, open_checkpoint
from kimi_jax.weights.reader import INDEX
from tools.synthetic_checkpoint import sized_config, write_checkpoint

RAW_THREADS = (4, 8, 16, 32)
RAW_BLOCK = 16 << 20


def read_raw(files: list[Path], threads: int) -> float:
    """Seconds to read all bytes of `files`."""
    blocks: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    for descriptor in descriptors:
        for begin in range(0, os.fstat(descriptor).st_size, RAW_BLOCK):
            blocks.put((descriptor, begin))
    buffers = [
        np.zeros(RAW_BLOCK, np.uint8) for _ in range(threads)
    ]  # touched before the clock runs

    def work(buffer: np.ndarray) -> None:
        while (block := blocks.get()) is not None:
            os.preadv(block[0], [memoryview(buffer)], block[1])

    for _ in range(threads):
        blocks.put(None)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, buffers))
    seconds = time.perf_counter() - began
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def link_rate() -> float | None:
    """GB/s from host memory to the first device; None on a CPU."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    threads, nbytes, times = 4, 32 << 20, 64
    with (
        load.host_buffers(threads, nbytes) as free,
        ThreadPoolExecutor(threads) as pool,
    ):
        views = [free.get() for _ in range(threads)]

        def send(number: int) -> None:
            load.copy_to(views[number % threads], device).block_until_ready()

        list(pool.map(send, range(threads)))
        began = time.perf_counter()
        list(pool.map(send, range(threads * times)))
        return threads * times * nbytes / 1e9 / (time.perf_counter() - began)


def drop_pages(files: list[Path]) -> None:
    """Asks the system to forget the files' pages; they must have been written out (fsync)."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def memory_watched(result: dict[str, Any]) -> Iterator[None]:
    """Largest growth, sampled, of this process's resident memory, and of what the system has in use.

    The second also counts memory that a driver pins; the page cache is in neither. Of the first also its
    kinds at that moment, as the kernel tells them apart: `anonymous`, `files` mapped, `shared`.
    """
    done = threading.Event()
    before, peak = (_resident(), _available()), [0, 0]
    kinds: dict[str, int] = {}

    def sample() -> None:
        while not done.wait(0.01):
            now = _resident()
            grown = {kind: now[kind] - before[0][kind] for kind in now}
            if sum(grown.values()) > peak[0]:
                peak[0] = sum(grown.values())
                kinds.update(grown)
            peak[1] = max(peak[1], before[1] - _available())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        result["process_gb"], result["system_gb"] = (round(n / 1e9, 2) for n in peak)
        result["process_kinds_gb"] = {kind: round(n / 1e9, 2) for kind, n in kinds.items()}


def timed_import(checkpoint: Checkpoint, ranks: Ranks) -> tuple[float, dict[str, Any]]:
    """Seconds until every array is in its place, and memory; the arrays are given up."""
    memory: dict[str, Any] = {}
    with memory_watched(memory):
        began = time.perf_counter()
        base = load.load_base(checkpoint, None, ranks)
        jax.block_until_ready(base)
        seconds = time.perf_counter() - began
    del base
    gc.collect()
    return seconds, memory


def measure(
    directory: Path, ranks: Ranks, say: Callable[[str], None], result: dict[str, Any]
) -> None:
    """Everything, in the order cold, warm.

    Args:
        directory: of the checkpoint.
        ranks: where it is imported to.
        say: told each of the two when it is in `result`.
        result: gets what was measured.
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
        "readers": load.READERS,
        "piece_mib": load.PIECE_BYTES >> 20,
    }
    link = link_rate()
    result["link_gb_s"] = None if link is None else round(link, 2)
    for name in ("cold", "warm"):
        rates = {}
        for threads in RAW_THREADS if name == "warm" else (load.READERS,):
            if name == "cold":
                drop_pages(files)
            rates[str(threads)] = round(size / 1e9 / read_raw(files, threads), 2)
        if name == "cold":
            drop_pages(files)
        seconds, memory = timed_import(checkpoint, ranks)
        rate, raw = size / 1e9 / seconds, max(rates.values())
        result[name] = {
            "raw_gb_s_by_threads": rates,
            "import_gb_s": round(rate, 2),
            "import_seconds": round(seconds, 2),
            "of_raw": round(rate / raw, 2),
            "of_slower_of_raw_and_link": round(rate / min(raw, link or raw), 2),
            "beyond_baseline": memory,
        }
        say(f"{name}: {json.dumps(result[name])}")


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    kinds = {"anonymous": "RssAnon", "files": "RssFile", "shared": "RssShmem"}
    return {kind: int(found[name].split()[0]) * 1024 for kind, name in kinds.items()}


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":") for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024


def main() -> None:
    """Reads the command line, makes the checkpoint if there is none, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=30.0, help="of a checkpoint that is made")
    parser.add_argument("--directory", type=Path, required=True, help="made, or used again")
    parser.add_argument("--expert", type=int, default=1, help="devices that share the experts")
    parser.add_argument("--readers", type=int, default=load.READERS)
    parser.add_argument("--piece-mib", type=int, default=load.PIECE_BYTES >> 20)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    load.READERS, load.PIECE_BYTES = options.readers, options.piece_mib << 20
    if not (options.directory / INDEX).is_file():
        began = time.perf_counter()
        total = write_checkpoint(options.directory, sized_config(options.gib))
        seconds = time.perf_counter() - began
        print(f"wrote {total / 1e9:.2f} GB in {seconds:.1f} s", flush=True)
    n = options.expert
    ranks = ONE_DEVICE if n == 1 else Ranks(n, 1, make_mesh(n))
    result: dict[str, Any] = {}
    measure(options.directory, ranks, lambda line: print(line, flush=True), result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("cold", "warm")}))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
