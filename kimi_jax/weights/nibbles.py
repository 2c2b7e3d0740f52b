"""What packed experts look like: a look at real nibbles, to tell how a file was packed.

Offset binary stores q + 8, so the nibble of a zero weight is 8; two's complement stores it as 0.
Trained weights crowd around zero, and quantisation-aware training never uses -8, so the two readings
of a file cannot be confused once its nibbles are counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kimi_jax.errors import UserError
from kimi_jax.int4 import GROUP_SIZE, LARGEST_CODE, unpack_numpy
from kimi_jax.weights.checkpoint import Checkpoint

Packing = Literal["offset_binary", "twos_complement", "undecided"]

LOWEST_CODE = -8
# Nibbles 8 and 0 must differ at least this much in number before one of them is called zero.
CLEAR_RATIO = 4
# Moonshot's rule leaves -8 unused and lets every group reach 7; these leave room for odd groups.
RARE, NEARLY_ALL = 1e-3, 0.99


@dataclass(frozen=True)
class NibbleReport:
    """Counts over sampled packed tensors, read as offset binary (nibble - 8).

    histogram: how often each code from -8 to 7 occurs. share_of_lowest: of code -8.
    share_of_full_groups: of groups of 32 whose largest |code| is 7. smallest_scale, largest_scale:
    of the samples' groups. moonshot_rule: whether codes look like absmax / 7 (-8 unused).
    """

    tensors: tuple[str, ...]
    histogram: dict[int, int]
    share_of_lowest: float
    share_of_full_groups: float
    smallest_scale: float
    largest_scale: float
    packing: Packing
    moonshot_rule: bool

    @property
    def verdict(self) -> str:
        """The finding in a sentence."""
        if self.packing == "twos_complement":
            return (
                "looks like two's complement: nibble 0 is as frequent as zero weights should be; "
                "kimi_jax reads offset binary and would misread every weight"
            )
        if self.packing == "undecided":
            return (
                "undecided: neither nibble 8 nor nibble 0 stands out as the zero of trained weights"
            )
        if self.moonshot_rule:
            return "offset binary confirmed; codes -7 to 7, as absmax / 7 gives"
        return (
            "offset binary confirmed; -8 is used or groups do not reach 7, so these are not "
            "absmax / 7 codes: requantising them changes codes even where nothing was trained"
        )


def sampled_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Packed tensors of the first, middle and last mixture-of-experts layer, one expert of each."""
    config = checkpoint.config
    layers, experts = config.num_moe_layers, config.n_routed_experts
    chosen = {
        (0, 0),
        (layers // 2, experts // 2),
        (layers - 1, experts - 1),
    }
    return tuple(
        name
        for name, tensor in checkpoint.tensors.items()
        if tensor.part == "packed" and (tensor.layer, tensor.expert) in chosen
    )


def look_at_nibbles(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> NibbleReport:
    """Counts the codes of `names`, or of `sampled_tensors`; a few tensors are read, not the checkpoint.

    Raises:
        UserError: a scale that is not finite.
    """
    names = sampled_tensors(checkpoint) if names is None else tuple(names)
    counts = np.zeros(16, np.int64)
    groups = full_groups = 0
    scales = []
    for name in names:
        codes = unpack_numpy(checkpoint.entries[name].read())
        counts += np.bincount((codes.ravel() - LOWEST_CODE).astype(np.uint8), minlength=16)
        largest = np.abs(codes).reshape(-1, GROUP_SIZE).max(axis=1)
        groups += largest.size
        full_groups += int((largest == LARGEST_CODE).sum())
        stem = name.removesuffix("weight_packed")
        scale = checkpoint.entries[f"{stem}weight_scale"].read().astype(np.float32)
        if not np.isfinite(scale).all():
            raise UserError(f"{stem}weight_scale: holds values that are not finite; is it damaged?")
        scales += [scale.min(), scale.max()]
    share_of_lowest = float(counts[0] / counts.sum())
    share_of_full_groups = full_groups / groups
    return NibbleReport(
        names,
        {code: int(counts[code - LOWEST_CODE]) for code in range(LOWEST_CODE, LARGEST_CODE + 1)},
        share_of_lowest,
        share_of_full_groups,
        float(min(scales)),
        float(max(scales)),
        _packing(int(counts[8]), int(counts[0])),
        share_of_lowest <= RARE and share_of_full_groups >= NEARLY_ALL,
    )


def _packing(nibble_8: int, nibble_0: int) -> Packing:
    if nibble_8 > CLEAR_RATIO * nibble_0:
        return "offset_binary"
    if nibble_0 > CLEAR_RATIO * nibble_8:
        return "twos_complement"
    return "undecided"
