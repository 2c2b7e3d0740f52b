"""What `impl="auto"` means for the grouped matmul: by the device, the operands and measurements."""

import logging
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.kernels.grouped_matmul.measured import MILLISECONDS
from kimi_jax.kernels.say import say_once, takes_kernels
from kimi_jax.kernels.types import GroupedAdapter, GroupedWeight, PackedWeight

_log = logging.getLogger(__name__)

SLOW = "the reference, which is many times slower than a Hopper GPU's own"


def choose(
    x_AI: Float[Array, "A in"], weight: GroupedWeight, adapter: GroupedAdapter | None
) -> Literal["reference", "pallas", "scratch"]:
    """The implementation for these operands on the device that is compiled for.

    Packed weights on a Hopper GPU: the faster of `pallas` and `scratch`, by `measured`. Otherwise
    the reference; on a GPU it is named in a warning, with the reason. Each choice is logged once per
    process and kind of operands.
    """
    values = weight.values if isinstance(weight, PackedWeight) else weight
    groups, out, width_in = values.shape[-3:]
    rows = x_AI.shape[0] / groups
    case = f"grouped matmul, {groups} x {width_in} -> {out}, {jnp.dtype(x_AI.dtype).name} rows"

    def problems() -> list[str]:
        # Imported for a Hopper GPU only: it brings in Mosaic GPU.
        from kimi_jax.kernels.grouped_matmul.mosaic import problems_of

        return problems_of(x_AI, weight, adapter)

    if not takes_kernels(_log, case, SLOW, problems):
        return "reference"
    nearest = _nearest(rows)
    chosen = min(MILLISECONDS, key=lambda name: MILLISECONDS[name][nearest])
    say_once(_log, logging.INFO, f"{case}: {chosen}, as measured at {nearest} rows a group")
    return chosen


def _nearest(rows: float) -> int:
    """The measured number of rows a group that is nearest by ratio."""
    counts = MILLISECONDS["pallas"]
    return min(counts, key=lambda count: max(count, rows) / max(min(count, rows), 1e-9))
