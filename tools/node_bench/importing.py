"""A synthetic checkpoint as large as the disk allows, and its import onto all GPUs, cold and warm."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_jax.errors import UserError
from kimi_jax.model.config import parse_model_config
from kimi_jax.model.params import weight_table
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.weights.reader import INDEX
from tools.load_bench.measuring import measure
from tools.synthetic_checkpoint import sized_config, write_checkpoint

GIB = 2**30
FREE_SHARE = 0.9  # of what is free may be taken
LEAST = 0.02  # GiB
WRITTEN = "written.json"
SYNTHETIC = "synthetic"  # its folder


def room(directory: Path, most: float, others: int) -> float:
    """GiB of a checkpoint that the disk has room for, at most `most`; `others`: bytes for other files."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    return max(0.0, min(most, (FREE_SHARE * free - others) / GIB))


def fitting_config(most: float) -> dict[str, Any]:
    """The largest of the synthetic sizes that is at most so many GiB.

    Raises:
        UserError: there is none.
    """
    if most >= LEAST:
        for percent in range(100, 40, -2):
            config = sized_config(most * percent / 100)
            table = weight_table(parse_model_config(config))
            if sum(weight.bytes for weight in table) <= most * GIB:
                return config
    raise UserError(f"the disk has room for {most:.2f} GiB of a checkpoint, too little to measure")


def write_synthetic(directory: Path, most: float) -> dict[str, Any]:
    """Writes a checkpoint of at most so many GiB, and beside it what that took."""
    began = time.perf_counter()
    size = write_checkpoint(directory, fitting_config(most))
    seconds = time.perf_counter() - began
    written = {"bytes": size, "seconds": seconds, "gb_s": size / 1e9 / seconds}
    (directory / WRITTEN).write_text(json.dumps(written), encoding="utf-8")
    return written


def measure_import(
    directory: Path,
    ranks: Ranks,
    found: dict[str, Any],
    save: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Imports the checkpoint of a directory onto the ranks; see `tools/bench_load.py`."""
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory}: no checkpoint was written; why stands in the output above")
    if (directory / WRITTEN).is_file():
        found["written"] = json.loads((directory / WRITTEN).read_text(encoding="utf-8"))

    def more(line: str) -> None:
        say(line)
        save()

    measure(directory, ranks, more, found)
