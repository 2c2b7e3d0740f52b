"""Whole imports, how far an import comes that does only a part, and where its time goes."""

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np

from kimi_jax.parallel.ranks import Ranks
from kimi_jax.weights import load
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.portions import Portion
from kimi_jax.weights.reader import Files, open_files
from kimi_jax.weights.reading import Span

TIMES = 3  # of a warm import; the median counts


def timed_import(checkpoint: Checkpoint, ranks: Ranks) -> float:
    """Seconds until every array is in its place; the arrays are given up."""
    began = time.perf_counter()
    base = load.load_base(checkpoint, None, ranks)
    jax.block_until_ready(base)
    seconds = time.perf_counter() - began
    del base
    gc.collect()
    return seconds


class _Nowhere:
    """In place of an array that a device would receive."""

    def is_ready(self) -> bool:
        return True


class _NoWriters:
    """In place of the programs that write pieces into their arrays."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "_NoWriters":
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, number: int, array: Any, *_: object) -> Any:
        return array


class _Block(NamedTuple):
    """In place of a portion: a part of a file as it is, for one device."""

    file: Path
    offset: int
    nbytes: int
    devices: Sequence[Any] = ()

    def spans(self) -> list[Span]:
        return [Span(self.file, self.offset, ((0, self.nbytes),))]

    def check(self, buffer: np.ndarray) -> None: ...

    def sent(self, buffer: np.ndarray) -> np.ndarray:
        return buffer[: self.nbytes]


def timed_blocks(files: Sequence[Path]) -> float:
    """Seconds to read files and send them to a device as an import does, but in blocks and to no place."""
    blocks: list[Any] = [
        _Block(file, begin, min(load.PIECE_BYTES, size - begin))
        for file in files
        for size in [file.stat().st_size]
        for begin in range(0, size, load.PIECE_BYTES)
    ]
    began = time.perf_counter()
    with open_files(files) as opened, closing(load._sent(opened, blocks)) as sent:
        deque(sent, maxlen=0)  # it ends when all have arrived
    return time.perf_counter() - began


def steps_of_an_import(checkpoint: Checkpoint, ranks: Ranks) -> dict[str, float]:
    """Seconds that the thread that sends spends on each step, and that it waits for readers and for devices.

    The rest is between the steps, and what is made before them: buffers, empty arrays, programs.
    """
    steps = {
        "plan": (load._Plans, "make"),
        "start": (load.Readers, "start"),
        "wait for readers": (load.Readers, "finished"),
        "wait for devices": (jax, "block_until_ready"),
        "check": (Portion, "check"),
        "send": (load, "copy_to"),
        "join": (load, "joined"),
        "write": (load.Writers, "write"),
    }
    spent = dict.fromkeys(steps, 0.0)
    with ExitStack() as stack:
        for name, (owner, attribute) in steps.items():
            added = _added(getattr(owner, attribute), spent, name)
            stack.enter_context(patch.object(owner, attribute, added))
        seconds = timed_import(checkpoint, ranks)
    spent |= {"rest": seconds - sum(spent.values()), "all": seconds}
    return {name: round(seconds, 3) for name, seconds in spent.items()}


def _added(call: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            spent[name] += time.perf_counter() - began

    return timed


def parts_of_an_import(checkpoint: Checkpoint, ranks: Ranks, size: int) -> dict[str, Any]:
    """GB/s of an import that only reads, that also sends, and that does everything.

    Of each also the share of its time for which the readers are within a system call or wait for
    Python's lock behind it (`busy`), and for which they have a core (`copying`): what is between the two is
    waiting, for the lock or for a core. And GB/s of one reader in either time, and the share for which the
    thread that sends has a core.
    """
    unplaced: dict[str, Any] = {
        "Writers": _NoWriters,
        "empty_arrays": lambda arrays: dict.fromkeys(held.array.path for held in arrays),
        "finished": lambda _, array: array,
    }
    nowhere = dict.fromkeys(("copy_to", "joined"), lambda *_: _Nowhere())
    replaced = {"read": unplaced | nowhere, "read and sent": unplaced, "placed": {}}
    result = {}
    for name, others in replaced.items():
        measured = []
        for _ in range(TIMES):
            busy: list[float] = []
            copying: list[float] = []
            own = time.thread_time()
            with ExitStack() as stack:
                for attribute, other in others.items():
                    stack.enter_context(patch.object(load, attribute, other))
                timed = _timed(Files.read, busy, copying)
                stack.enter_context(patch.object(Files, "read", timed))
                seconds = timed_import(checkpoint, ranks)
            own = time.thread_time() - own
            measured.append((seconds, sum(busy), sum(copying), own))
        seconds, busy_seconds, copying_seconds, own = sorted(measured)[len(measured) // 2]
        result[name] = {
            "gb_s": round(size / 1e9 / seconds, 2),
            "readers_busy": round(busy_seconds / load.READERS / seconds, 2),
            "readers_copying": round(copying_seconds / load.READERS / seconds, 2),
            "gb_s_of_a_busy_reader": round(size / 1e9 / busy_seconds, 2),
            "gb_s_of_a_copying_reader": round(size / 1e9 / copying_seconds, 2),
            "sender_on_a_core": round(own / seconds, 2),
        }
    return result


def _timed(
    read: Callable[..., None], busy: list[float], copying: list[float]
) -> Callable[..., None]:
    def timed(*arguments: Any) -> None:
        began, own = time.perf_counter(), time.thread_time()
        read(*arguments)
        copying.append(time.thread_time() - own)
        busy.append(time.perf_counter() - began)

    return timed
