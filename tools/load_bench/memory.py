"""Host memory while something runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    kinds = {"anonymous": "RssAnon", "files": "RssFile", "shared": "RssShmem"}
    return {kind: int(found[name].split()[0]) * 1024 for kind, name in kinds.items()}


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":") for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024
