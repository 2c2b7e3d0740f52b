"""Reads files as fast as the machine can, by itself and beside transfers to devices."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from kimi_jax.weights.reading import host_buffers
from tools.load_bench.transfers import sending

THREADS = (8, 16, 24, 32)
BLOCKS_MIB = (4, 16)
ONE = (16, 16)  # threads, MiB of a block: where only one is measured


def read_raw(files: list[Path], threads: int, block: int) -> float:
    """Seconds to read all bytes of `files` in blocks of so many bytes, into memory as imports use it."""
    blocks: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    for descriptor in descriptors:
        for begin in range(0, os.fstat(descriptor).st_size, block):
            blocks.put((descriptor, begin))

    def work(memory: np.ndarray) -> None:
        buffer = memoryview(memory)[:block]
        while (wanted := blocks.get()) is not None:
            os.preadv(wanted[0], [buffer], wanted[1])

    for _ in range(threads):
        blocks.put(None)
    with host_buffers(threads, block) as buffers:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, buffers))
        seconds = time.perf_counter() - began
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def read_beside_transfers(files: list[Path], size: int, devices: list[Any]) -> dict[str, Any]:
    """GB/s of reading the files raw while memory that has nothing to do with them goes to the devices."""
    found = {}
    for mib in BLOCKS_MIB:
        with sending(devices) as gb:
            before = gb()
            threads = ONE[0]
            seconds = read_raw(files, threads, mib << 20)
            found[f"{threads} × {mib} MiB"] = {
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
