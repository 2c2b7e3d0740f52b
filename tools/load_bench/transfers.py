"""What the way from the host's memory to the devices carries."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from kimi_jax.weights.load import copy_to
from kimi_jax.weights.reading import host_buffers


@contextmanager
def sending(devices: list[Any]) -> Iterator[Callable[[], float]]:
    """Threads that copy host memory to `devices` as fast as it goes; yields what tells GB so far."""
    threads, nbytes = 4 * len(devices), 32 << 20
    sent, done = [0] * threads, threading.Event()
    with (
        host_buffers(threads, nbytes) as views,
        ThreadPoolExecutor(threads) as pool,
    ):

        def send(number: int) -> None:
            while not done.is_set():
                device = devices[number % len(devices)]
                copy_to(views[number], device).block_until_ready()
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
