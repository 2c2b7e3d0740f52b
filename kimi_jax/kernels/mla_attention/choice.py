"""What `impl="auto"` means for attention: by the device and the operands."""

import logging
from functools import cache
from typing import Literal

from jaxtyping import Array, Float

from kimi_jax.kernels.hopper import on_hopper
from kimi_jax.kernels.target import device_kind

_log = logging.getLogger(__name__)


def choose(
    q_BTNH: Float[Array, "B T N qk"], v_BTNU: Float[Array, "B T N U"]
) -> Literal["reference", "pallas"]:
    """`pallas` on a Hopper GPU for operands that it takes, otherwise the reference.

    cuDNN is not chosen: it was slower in both directions where it could be compared (LOG.md). Each
    choice is logged once per process and kind of operands, as a warning where the reference, which
    holds every score in memory, runs on a GPU.
    """
    kind = device_kind()
    case = f"attention, {q_BTNH.dtype} heads {q_BTNH.shape[-1]} and {v_BTNU.shape[-1]} wide"
    if kind.casefold() == "cpu":
        _say(logging.DEBUG, f"{case}: the reference, on a CPU")
        return "reference"
    problem = f"{kind} is not a Hopper GPU"
    if on_hopper():
        # Imported for such a GPU only: it brings in Mosaic GPU.
        from kimi_jax.kernels.mla_attention.mosaic import problem_of

        problem = problem_of(q_BTNH, v_BTNU)
        if problem is None:
            _say(logging.INFO, f"{case}: pallas")
            return "pallas"
    _say(logging.WARNING, f"{case}: the reference, with every score in memory, because {problem}")
    return "reference"


@cache
def _say(level: int, message: str) -> None:
    """Once per process."""
    _log.log(level, message)
