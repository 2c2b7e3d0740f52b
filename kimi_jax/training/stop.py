"""Leaving cleanly when the system asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Noted:
    """The last signal that has come to this process; 0: none."""

    number: int = 0


@contextmanager
def stop_signals() -> Iterator[Noted]:
    """Notes SIGTERM and Ctrl-C, for the loop to end after the step in hand.

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
