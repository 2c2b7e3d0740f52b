"""Leaving cleanly when the system asks for it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kimi_jax.parallel import processes


@dataclass
class Noted:
    """The last signal that has come to this process; 0: none."""

    number: int = 0

    def ask(self) -> Callable[[], int]:
        """The largest of all processes' numbers, to be read later; all of them ask, in the same place.

        Alone, what has come until it is read; of several, until they asked.
        """
        if processes.count() == 1:
            return lambda: self.number
        return processes.largest_soon(self.number)


@contextmanager
def stop_signals() -> Iterator[Noted]:
    """Notes SIGTERM and Ctrl-C, for the loop to end after the steps in flight.

    A second signal has its ordinary effect, at once.
    """
    noted = Noted()

    def note(number: int, _: Any) -> None:
        noted.number = number
        for each, old in before.items():
            signal.signal(each, old)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, old in before.items():
            signal.signal(number, old)
