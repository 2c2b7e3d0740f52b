"""GPUs as data: how much memory each kind has, and how many a machine usually joins."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kimi_jax.errors import UserError

TARGETS = Path(__file__).parent.parent / "assets" / "targets"
DEFAULT = "H200"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GiB|GB)")
_UNITS = {"GiB": 2**30, "GB": 10**9}


@dataclass(frozen=True)
class Gpu:
    """One kind of device. memory: bytes of the whole; node: how many NVLink usually joins."""

    name: str
    device_kind: str
    memory: int
    node: int
    target: str | None = None

    @property
    def target_config(self) -> str | None:
        """XLA's description of this kind, a text proto, if there is one."""
        if self.target is None:
            return None
        return (TARGETS / self.target).read_text(encoding="utf-8")


@cache
def known_gpus() -> tuple[Gpu, ...]:
    """The kinds of `assets/targets/gpus.json`, in its order."""
    rows = json.loads((TARGETS / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    return tuple(
        Gpu(row["name"], row["device_kind"], row["memory_mib"] * 2**20, row["node"], row["target"])
        for row in rows
    )


def find_gpu(name: str) -> Gpu:
    """A kind by its name, by what JAX calls it, or by size alone (`96GB`, `89.4 GiB`).

    Raises:
        UserError: neither known nor a size.
    """
    for gpu in known_gpus():
        if name.casefold() in (gpu.name.casefold(), gpu.device_kind.casefold()):
            return gpu
    if size := _SIZE.fullmatch(name):
        return Gpu(name, name, int(float(size[1]) * _UNITS[size[2]]), 8)
    known = ", ".join(gpu.name for gpu in known_gpus())
    raise UserError(
        f"device {name!r} is not known; required: one of {known}, or its memory, like 96GB"
    )
