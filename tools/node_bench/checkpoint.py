"""A training checkpoint saved and restored on the ranks at hand: seconds, bytes, and equal bits."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.step import TrainState
from tools.load_bench.memory import memory_watched
from tools.load_bench.raw import drop_pages
from tools.node_bench.record import Skipped

MARGIN = 1.05  # of a checkpoint's bytes have to be free


def measure_checkpoint(
    state: TrainState, directory: Path, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Saves a state, drops the files from the page cache, and restores it beside the one there is.

    Args:
        state: adapters and moments, as they lie on the devices.
        directory: where the files go; they are removed at the end.
        found: gets what is measured.
        save: called when there is something new in it.

    Raises:
        Skipped: the disk is too small.
        AssertionError: what was restored differs in a bit.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    found |= {"bytes": size, "free_bytes": free}
    if free < MARGIN * size:
        raise Skipped(f"{size / 1e9:.1f} GB are to be saved and {free / 1e9:.1f} GB are free")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=directory))
    try:
        _save(state, folder, size, found)
        save()
        _restore(state, folder, size, found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(state: TrainState, folder: Path, size: int, found: dict[str, Any]) -> None:
    memory: dict[str, Any] = {}
    with memory_watched(memory):
        began = time.perf_counter()
        with Checkpoints(folder) as kept:
            kept.save(state, {})
            copied = time.perf_counter() - began
            kept.wait()
            saved = time.perf_counter() - began
    files = [path for path in folder.rglob("*") if path.is_file()]
    found |= {
        # The training loop goes on when the values are copied.
        "save_blocks_s": copied,
        "save_s": saved,
        "save_gb_s": size / 1e9 / saved,
        "files": len(files),
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "host_memory_saving": memory,
    }


def _restore(state: TrainState, folder: Path, size: int, found: dict[str, Any]) -> None:
    drop_pages([path for path in folder.rglob("*") if path.is_file()])
    memory: dict[str, Any] = {}
    with memory_watched(memory):
        began = time.perf_counter()
        with Checkpoints(folder, read_only=True) as kept:
            restored = jax.block_until_ready(kept.restore(state)[0])
        seconds = time.perf_counter() - began
    different = differing(state, restored)
    found |= {
        "restore_s": seconds,
        "restore_gb_s": size / 1e9 / seconds,
        "host_memory_restoring": memory,
        "equal": not different,
    }
    assert not different, f"restored otherwise: {', '.join(different[:5])}"


def differing(one: Any, other: Any) -> list[str]:
    """Paths of the arrays of which a bit differs between two trees of 4-byte numbers."""

    def bits(x: Any) -> Any:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)

    @jax.jit
    def equal(one: Any, other: Any) -> Any:
        return jax.tree.map(lambda a, b: (bits(a) == bits(b)).all(), one, other)

    found = jax.tree_util.tree_leaves_with_path(jax.device_get(equal(one, other)))
    return [jax.tree_util.keystr(path) for path, same in found if not same]
