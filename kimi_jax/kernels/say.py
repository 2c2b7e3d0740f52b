"""Whether the Hopper kernels are taken, and saying so: once per process and kind of operands."""

import logging
from collections.abc import Callable
from functools import cache

from kimi_jax.kernels.hopper import on_hopper
from kimi_jax.kernels.target import device_kind


@cache
def say_once(log: logging.Logger, level: int, message: str) -> None:
    """Logs a message that this process has not logged yet."""
    log.log(level, message)


def takes_kernels(
    log: logging.Logger, case: str, instead: str, problems: Callable[[], list[str]]
) -> bool:
    """Whether the device that is compiled for and the operands are what the Hopper kernels take.

    If not, it is said why: on a CPU for whoever looks, on a GPU as a warning.

    Args:
        log: of the module that asks.
        case: the operation and its operands, in words.
        instead: what is taken otherwise, and what that costs.
        problems: with the operands. Called on a Hopper GPU only, so it may import Mosaic GPU.
    """
    kind = device_kind()
    if kind.casefold() == "cpu":
        say_once(log, logging.DEBUG, f"{case}: the reference, on a CPU")
        return False
    found = problems() if on_hopper() else [f"{kind} is not a Hopper GPU"]
    if found:
        say_once(log, logging.WARNING, f"{case}: {instead}, because {'; '.join(found)}")
    return not found
