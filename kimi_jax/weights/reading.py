"""Threads that fill memory from a checkpoint's files, and memory that a GPU reads by itself.

What is asked for here is done in no order; who asks is told what is there.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple, Self

import jax
import numpy as np

from kimi_jax.weights.reader import Files

PAGE = 4096  # bytes, of memory: where a buffer begins


class Span(NamedTuple):
    """A file's bytes from `offset` on, and where they go: ranges of a buffer, one after the other."""

    file: Path
    offset: int
    into: tuple[tuple[int, int], ...]


def shares(spans: Iterable[Span], nbytes: int) -> list[list[Span]]:
    """Spans for one thread each: about so many bytes, longer ones cut, those that join in a file joined.

    Args:
        spans: in the order of their files.
        nbytes: of a share; it is at most half as large again.
    """
    found: list[list[Span]] = []
    size = end = 0  # of the last share: its bytes, and where its last span ends
    most = 1.5 * nbytes
    for file, offset, ranges in spans:
        for begin, stop in ranges:
            step = nbytes if stop - begin > most else stop - begin
            for first in range(begin, stop, step):
                part = (first, min(first + step, stop))
                count = part[1] - first
                if not found or size + count > most:
                    found.append([])
                    size = 0
                share = found[-1]
                if share and (share[-1].file, end) == (file, offset):
                    share[-1] = Span(file, share[-1].offset, (*share[-1].into, part))
                else:
                    share.append(Span(file, offset, (part,)))
                offset += count
                size, end = size + count, offset
    return found


def cores() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Readers:
    """Threads that read spans of files, as a context.

    The threads do nothing else, and that in few steps: whoever sends to the devices waits for Python's
    lock each time that one of them has it, and they wait while he has it.

    Args:
        files: open as long as the readers are.
        count: of threads.
    """

    def __init__(self, files: Files, count: int) -> None:
        self._files = files
        self._wanted: SimpleQueue[tuple[int, memoryview, Sequence[Span]] | None] = SimpleQueue()
        self._filled: SimpleQueue[int | BaseException] = SimpleQueue()
        self._left: dict[int, int] = {}  # shares of a tag that are not read yet
        self._lock = Lock()
        self._threads = [Thread(target=self._read, daemon=True) for _ in range(count)]

    def __enter__(self) -> Self:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # a limit of the system: those that run would wait for ever
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        with suppress(Empty):  # after an error nobody wants what has not been begun
            while True:
                self._wanted.get_nowait()
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()

    def start(self, tag: int, memory: np.ndarray, spans: Sequence[Sequence[Span]]) -> None:
        """Has spans read into a memory of uint8, by a thread for each sequence of them.

        Nothing else is outstanding for the tag.
        """
        assert spans
        assert not self._left.get(tag)
        self._left[tag] = len(spans)
        view = memoryview(memory)
        for share in spans:
            self._wanted.put((tag, view, share))

    def finished(self, timeout: float | None = None) -> list[int]:
        """Tags whose spans have all been read since the last call.

        Args:
            timeout: seconds to wait for a first one; None: as long as it takes.

        Raises:
            UserError: a file that cannot be read; of several the first that was met.
        """
        tags: list[int] = []
        with suppress(Empty):
            filled = self._filled.get(timeout=timeout)
            while True:
                if isinstance(filled, BaseException):
                    raise filled
                tags.append(filled)
                filled = self._filled.get_nowait()
        return tags

    def _read(self) -> None:
        read = self._files.read
        while (wanted := self._wanted.get()) is not None:
            tag, memory, spans = wanted
            try:
                for file, offset, ranges in spans:
                    read(file, offset, [memory[begin:end] for begin, end in ranges])
            except BaseException as error:  # raised where it is waited for
                self._filled.put(error)
            else:
                with self._lock:
                    self._left[tag] -= 1
                    last = not self._left[tag]
                if last:  # only then: who waits for it is not woken for a part
                    self._filled.put(tag)


@contextmanager
def host_buffers(count: int, nbytes: int) -> Iterator[list[np.ndarray]]:
    """Buffers, uint8, of at least `nbytes` each, in memory that a GPU may read by itself."""
    size = -(-max(nbytes, 1) // PAGE) * PAGE
    mapping = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # advice, which some kernels do not take: fewer pages to take and pin
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    buffers = np.split(memory, count)
    with ThreadPoolExecutor(count) as pool:  # taking the pages one after the other costs much more
        list(pool.map(_touch, buffers))
    with _mapped(memory):
        yield buffers


def _touch(memory: np.ndarray) -> None:
    memory.fill(0)


@contextmanager
def _mapped(memory: np.ndarray) -> Iterator[None]:
    """Memory that the GPUs read directly. Without it each transfer is copied once more on the way."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        yield
        return
    address = memory.ctypes.data
    device.client.dma_map(address, memory.nbytes)
    try:
        yield
    finally:
        device.client.dma_unmap(address)
