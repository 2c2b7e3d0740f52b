"""Threads that fill memory from a checkpoint's files, and memory that a GPU reads by itself.

What is asked for here is done in no order; who asks is told what is there.
"""

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple, Self

import jax
import numpy as np

from kimi_jax.weights.reader import Files

_ALIGNED = 4096  # bytes, where a buffer begins


class Span(NamedTuple):
    """A file's bytes from `offset` on, and what they are read into: arrays of uint8, one after the other."""

    file: Path
    offset: int
    into: tuple[np.ndarray, ...]


def shares(spans: Sequence[Span], nbytes: int) -> list[list[Span]]:
    """Spans for one thread each: about so many bytes, longer ones cut, those that join in a file joined.

    Args:
        spans: in the order of their files.
        nbytes: of a share; it is at most half as large again.
    """
    found: list[list[Span]] = []
    size = end = 0  # of the last share: its bytes, and where its last span ends
    for file, offset, arrays in spans:
        for array in arrays:
            for begin in range(0, array.nbytes, nbytes):
                part = array[begin : begin + nbytes]
                if not found or size + part.nbytes > 1.5 * nbytes:
                    found.append([])
                    size = 0
                share = found[-1]
                if share and (share[-1].file, end) == (file, offset):
                    share[-1] = share[-1]._replace(into=(*share[-1].into, part))
                else:
                    share.append(Span(file, offset, (part,)))
                offset += part.nbytes
                size, end = size + part.nbytes, offset
    return found


class Readers:
    """Threads that read spans of files, as a context.

    The threads do nothing else, and that in few steps: whoever sends to the devices waits for Python's
    lock each time that one of them has it.

    Args:
        files: open as long as the readers are.
        count: of threads.
    """

    def __init__(self, files: Files, count: int) -> None:
        self._files = files
        self._wanted: SimpleQueue[tuple[int, Sequence[Span]] | None] = SimpleQueue()
        self._filled: SimpleQueue[int | BaseException] = SimpleQueue()
        self._left: Counter[int] = Counter()
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

    def start(self, tag: int, spans: Sequence[Sequence[Span]]) -> None:
        """Has spans read, by a thread for each sequence of them. Nothing else is outstanding for the tag."""
        assert spans
        assert not self._left[tag]
        self._left[tag] = len(spans)
        for share in spans:
            self._wanted.put((tag, share))

    def finished(self, timeout: float | None = None) -> list[int]:
        """Tags whose spans have all been read since the last call.

        Args:
            timeout: seconds to wait for a thread's share; None: until one is read.

        Raises:
            UserError: a file that cannot be read; of several the first that was met.
        """
        tags = []
        with suppress(Empty):
            filled = self._filled.get(timeout=timeout)
            while True:
                if isinstance(filled, BaseException):
                    raise filled
                self._left[filled] -= 1
                if not self._left[filled]:
                    tags.append(filled)
                filled = self._filled.get_nowait()
        return tags

    def _read(self) -> None:
        read = self._files.read
        while (wanted := self._wanted.get()) is not None:
            tag, spans = wanted
            try:
                for file, offset, into in spans:
                    read(file, offset, into)
            except BaseException as error:  # raised where it is waited for
                self._filled.put(error)
            else:
                self._filled.put(tag)


@contextmanager
def host_buffers(count: int, nbytes: int) -> Iterator[list[np.ndarray]]:
    """Buffers, uint8, of at least `nbytes` each, in memory that a GPU may read by itself."""
    size = -(-max(nbytes, 1) // _ALIGNED) * _ALIGNED
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
