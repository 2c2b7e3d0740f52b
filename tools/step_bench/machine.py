"""What a measurement runs on, the machine's ceilings, and the clock of a start."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.training.kept import CACHE_HIT
from tools.kernel_benches.harness import measure

DATASHEET = 989e12  # dense bf16 of an H200, operations a second
MATMUL, COPIED = 8192, 2**30
SMALL_MATMUL, SMALL_COPIED = 256, 2**20  # where there is no GPU to measure
CACHE_MISS = "/jax/compilation_cache/cache_misses"


def has_gpu() -> bool:
    """Whether the device at hand is one."""
    return jax.devices()[0].platform == "gpu"


def describe(arguments: list[str], overrides: list[str]) -> dict[str, Any]:
    """GPU, driver, versions, flags and the command line."""
    device = jax.devices()[0]
    driver = "none"
    if has_gpu():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "driver": driver,
        "runtime": device.client.platform_version.split("\n")[-1],
        "jax": jax.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "memory_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ""),
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
        "arguments": arguments,
        "overrides": overrides,
    }


def ceilings() -> dict[str, float]:
    """Operations/s of a bf16 product and bytes/s (read + written) of a copy, measured now."""
    size, copied = (MATMUL, COPIED) if has_gpu() else (SMALL_MATMUL, SMALL_COPIED)
    big = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = 2 * size**3 / measure(lambda a: a @ a, big).time_s
    wide = jax.random.normal(jax.random.key(1), (copied // 2,), jnp.bfloat16)
    return {"size": size, "matmul": product, "copy": 2 * copied / measure(jnp.copy, wide).time_s}


def memory(what: str, device: int = 0) -> int:
    """`bytes_in_use` now, or `peak_bytes_in_use` since the process began; 0 where nothing counts."""
    return (jax.local_devices()[device].memory_stats() or {}).get(what, 0)


def seconds_since_start() -> float:
    """Of this process: from its creation on Linux, elsewhere since Python's own clock of it began."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.process_time()
    # The fields behind the command's name, which may hold spaces; the 22nd of all is the start.
    ticks = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Startup:
    """Seconds from the process's creation, phase after phase; what is not of the start is left out."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float, str]] = []
        self.last = seconds_since_start()
        self.hits = self.misses = 0
        self.add("Python, imports, configuration", self.last)
        jax.monitoring.register_event_listener(self._heard)

    def _heard(self, event: str, **_: Any) -> None:
        self.hits += event == CACHE_HIT
        self.misses += event == CACHE_MISS

    def add(self, name: str, seconds: float, note: str = "") -> None:
        """One phase with a known time."""
        self.phases.append((name, seconds, note))

    def done(self, name: str) -> None:
        """The phase that ends now and began when the last one ended."""
        now = seconds_since_start()
        self.add(name, now - self.last, self._cached())
        self.last = now

    def _cached(self) -> str:
        hits, misses, self.hits, self.misses = self.hits, self.misses, 0, 0
        if not hits and not misses:
            return ""
        return f"{hits} programs from the compilation cache, {misses} compiled"

    @property
    def total(self) -> float:
        """All phases."""
        return sum(seconds for _, seconds, _ in self.phases)

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        rows = [{"phase": n, "seconds": s, "note": note} for n, s, note in self.phases]
        return {"phases": rows, "total_s": self.total}
