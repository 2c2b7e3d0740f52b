"""Measures an import against reading the same files raw, cold and warm, and the host memory it takes.

    python tools/bench_load.py --gib 30 --directory DIR [--expert N] [--json FILE]

Also, what the way to the devices can carry: memory that GPUs read by themselves, copied to each of them
by four threads. An import cannot be faster than the slower of the two.

Makes the checkpoint if the directory has none (see synthetic_checkpoint.py). Raw: threads read the
files in order, in blocks, into buffers that they use again; with small blocks all buffers fit the
processor's cache, with large ones they do not. Cold: the files' pages are dropped from the page cache
before. Warm also: the same raw reading while other memory is sent to the devices, for an import does
both with one machine's memory. `--try` imports once more, warm, with other settings (readers, buffers,
MiB of a piece, MiB of a thread's share, pieces of a program): `--try 16,6,32,4,4 24,8,32,4,4`. GB are
10⁹ bytes.
"""

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from statistics import median
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

RAW_THREADS = (8, 16, 24, 32)
RAW_BLOCKS_MIB = (4, 16)
PAGES = ("cold", "warm")
WARM_IMPORTS = 3  # their median counts
TUNED = ("READERS", "BUFFERS", "PIECE_BYTES", "SHARE_BYTES", "TOGETHER")


def read_raw(files: list[Path], threads: int, block: int) -> float:
    """Seconds to read all bytes of `files` in blocks of so many bytes."""
    blocks: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    for descriptor in descriptors:
        for begin in range(0, os.fstat(descriptor).st_size, block):
            blocks.put((descriptor, begin))
    buffers = [np.ones(block, np.uint8) for _ in range(threads)]  # touched before the clock runs

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


@contextmanager
def sending(devices: list[Any]) -> Iterator[Callable[[], float]]:
    """Threads that copy host memory to `devices` as fast as it goes; yields what tells GB so far."""
    threads, nbytes = 4 * len(devices), 32 << 20
    sent, done = [0] * threads, threading.Event()
    with (
        load.host_buffers(threads, nbytes) as views,
        ThreadPoolExecutor(threads) as pool,
    ):

        def send(number: int) -> None:
            while not done.is_set():
                device = devices[number % len(devices)]
                load.copy_to(views[number], device).block_until_ready()
                sent[number] += nbytes

        running = [pool.submit(send, number) for number in range(threads)]
        while not all(sent) and not any(each.done() for each in running):
            time.sleep(0.001)
        try:
            yield lambda: sum(sent) / 1e9
        finally:
            done.set()
            for each in running:
                each.result()


def link_rate(devices: list[Any]) -> float:
    """GB/s from host memory to `devices` at once."""
    with sending(devices) as gb:
        before, began = gb(), time.perf_counter()
        time.sleep(1)
        return round((gb() - before) / (time.perf_counter() - began), 2)


def read_beside_transfers(files: list[Path], size: int, devices: list[Any]) -> dict[str, Any]:
    """GB/s of reading the files raw while memory that has nothing to do with them goes to the devices."""
    found = {}
    for mib in RAW_BLOCKS_MIB:
        with sending(devices) as gb:
            before = gb()
            seconds = read_raw(files, load.READERS, mib << 20)
            found[f"{load.READERS} × {mib} MiB"] = {
                "raw_gb_s": round(size / 1e9 / seconds, 2),
                "transfers_gb_s": round((gb() - before) / seconds, 2),
            }
    return found


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
    if "cold" not in pages:  # the first import compiles
        timed_import(checkpoint, ranks)
    for name in pages:
        rates = {}
        for mib in RAW_BLOCKS_MIB if name == "warm" else RAW_BLOCKS_MIB[-1:]:
            for threads in RAW_THREADS if name == "warm" else (load.READERS,):
                if name == "cold":
                    drop_pages(files)
                seconds = read_raw(files, threads, mib << 20)
                rates[f"{threads} × {mib} MiB"] = round(size / 1e9 / seconds, 2)
        if name == "cold":
            drop_pages(files)
        seconds, memory = timed_import(checkpoint, ranks)
        if name == "warm":
            again = [timed_import(checkpoint, ranks)[0] for _ in range(WARM_IMPORTS - 1)]
            seconds = median([seconds, *again])
        rate, raw = size / 1e9 / seconds, max(rates.values())
        result[name] = {
            "raw_gb_s": rates,
            "import_gb_s": round(rate, 2),
            "import_seconds": round(seconds, 2),
            "of_raw": round(rate / raw, 2),
            "of_slower_of_raw_and_link": round(rate / min(raw, link or raw), 2),
            "of_raw_in_blocks_of_mib": {
                mib: round(
                    rate / max(r for key, r in rates.items() if key.endswith(f" {mib} MiB")), 2
                )
                for mib in {int(key.split()[2]) for key in rates}
            },
            "beyond_baseline": memory,
        }
        if name == "warm" and link is not None:
            result[name]["beside_transfers"] = read_beside_transfers(files, size, devices)
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
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES)
    parser.add_argument("--try", nargs="*", default=[], dest="others", help="other settings")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if not (options.directory / INDEX).is_file():
        began = time.perf_counter()
        total = write_checkpoint(options.directory, sized_config(options.gib))
        seconds = time.perf_counter() - began
        print(f"wrote {total / 1e9:.2f} GB in {seconds:.1f} s", flush=True)
    n = options.expert
    ranks = ONE_DEVICE if n == 1 else Ranks(n, 1, make_mesh(n))
    result: dict[str, Any] = {}
    measure(options.directory, ranks, lambda line: print(line, flush=True), result, options.pages)
    print(json.dumps({k: v for k, v in result.items() if k not in PAGES}))
    result["others"] = []
    for text in options.others:
        readers, buffers, piece, span, together = (int(number) for number in text.split(","))
        values = (readers, buffers, piece << 20, span << 20, together)
        for name, value in zip(TUNED, values, strict=True):
            setattr(load, name, value)
        checkpoint = open_checkpoint(options.directory)
        seconds = [timed_import(checkpoint, ranks)[0] for _ in range(3)][1:]  # the first compiles
        rates = [round(result["gb"] / second, 2) for second in seconds]
        result["others"].append({"settings": text, "import_gb_s": rates})
        print(f"{text}: {rates}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
