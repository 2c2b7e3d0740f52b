"""What `impl="auto"` means for attention: by the device and the operands."""

import logging
from typing import Literal

from jaxtyping import Array, Float

from kimi_jax.kernels.mla_attention.reference import widths
from kimi_jax.kernels.say import say_once, takes_kernels

_log = logging.getLogger(__name__)

SLOW = "the reference, with every score in memory"


def choose(
    q_BTNH: Float[Array, "B T N qk"],
    kv_BTNH: Float[Array, "B T N kv"],
    rope_key_BTR: Float[Array, "B T R"],
) -> Literal["reference", "pallas"]:
    """`pallas` on a Hopper GPU for operands that it takes, otherwise the reference.

    cuDNN is not chosen: it was slower in both directions where it could be compared (LOG.md). Each
    choice is logged once per process and kind of operands, as a warning where the reference, which
    holds every score in memory, runs on a GPU.
    """
    nope, rope, value = widths(q_BTNH, kv_BTNH, rope_key_BTR)
    case = f"attention, {q_BTNH.dtype} heads {nope} + {rope} and {value} wide"

    def problems() -> list[str]:
        # Imported for a Hopper GPU only: it brings in Mosaic GPU.
        from kimi_jax.kernels.mla_attention.mosaic import problem_of

        problem = problem_of(q_BTNH, kv_BTNH, rope_key_BTR)
        return [] if problem is None else [problem]

    if not takes_kernels(_log, case, SLOW, problems):
        return "reference"
    say_once(_log, logging.INFO, f"{case}: pallas")
    return "pallas"
