"""Leaving cleanly when the system asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(stop: dict[str, str]) -> Iterator[None]:
    """Notes SIGTERM and Ctrl-C in `stop["signal"]`, for the loop to end after the step in hand.

    A second signal has its ordinary effect, at once.
    """

    def note(number: int, _: Any) -> None:
        stop["signal"] = signal.Signals(number).name
        for each, old in before.items():
            signal.signal(each, old)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
