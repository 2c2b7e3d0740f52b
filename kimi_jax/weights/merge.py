"""The arithmetic of merging an adapter into one weight: W + alpha / rank · B · A, rounded to a format.

Rows are independent, so large weights are handled in blocks of rows. A value (bf16) or a group (int4)
whose change is exactly zero keeps its bits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped

from kimi_jax.int4 import (
    GROUP_SIZE,
    dequantise_numpy,
    pack_numpy,
    quantise_numpy,
    unpack_numpy,
)

_BLOCK = 1 << 20  # values of a weight handled at once; copies of them stay in the processor's cache


class LowRank(NamedTuple):
    """An adapter of one matrix."""

    a: Float32[np.ndarray, "r in"]
    b: Float32[np.ndarray, "out r"]
    scale: float

    @property
    def is_zero(self) -> bool:
        """Whether a factor is zero throughout, as B is before the first step."""
        return not (self.a.any() and self.b.any())

    def change(self, rows: slice) -> Float32[np.ndarray, "rows in"]:
        """alpha / rank · B · A of some rows."""
        return np.float32(self.scale) * (self.b[rows] @ self.a)


class Survival(NamedTuple):
    """How an intended change (fp32) and the realised one (after rounding) compare: sums of products."""

    intended: float = 0.0  # <intended, intended>
    realised: float = 0.0  # <realised, realised>
    overlap: float = 0.0  # <realised, intended>

    def plus(self, other: "Survival") -> "Survival":
        """Both together."""
        return Survival(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def cosine(self) -> float:
        """Of the angle between the two; 0 if nothing was realised."""
        length = (self.intended * self.realised) ** 0.5
        return self.overlap / length if length else 0.0

    @property
    def projection(self) -> float:
        """The part of the intended change that the realised one holds, 1 if all."""
        return self.overlap / self.intended if self.intended else 1.0

    @property
    def fidelity(self) -> float:
        """The smaller of the two: next to much rounding noise, a projection alone may be large by chance."""
        return min(self.cosine, self.projection)


def merge_bf16(
    weight: Shaped[np.ndarray, "out in"], adapter: LowRank
) -> tuple[Shaped[np.ndarray, "out in"], Survival]:
    """A bf16 weight with the adapter added in fp32, rounded to bf16."""
    merged = np.empty(weight.shape, ml_dtypes.bfloat16)
    survival = Survival()
    for rows in _blocks(weight.shape):
        change = adapter.change(rows)
        before = weight[rows].astype(np.float32)
        merged[rows] = np.where(
            change != 0, (before + change).astype(ml_dtypes.bfloat16), weight[rows]
        )
        survival = survival.plus(compare(change, merged[rows].astype(np.float32) - before))
    return merged, survival


def merge_int4(
    words: Int32[np.ndarray, "out words"],
    scale: Shaped[np.ndarray, "out groups"],
    adapter: LowRank,
) -> tuple[Int32[np.ndarray, "out words"], Shaped[np.ndarray, "out groups"], Survival]:
    """A packed weight dequantised, changed in fp32, and quantised again by Moonshot's rule."""
    new_words, new_scale = np.empty_like(words), np.empty_like(scale)
    survival = Survival()
    out_size, in_size = len(words), adapter.a.shape[-1]
    for rows in _blocks((out_size, in_size)):
        change = adapter.change(rows)
        codes = unpack_numpy(words[rows])
        before = dequantise_numpy(codes, scale[rows]).astype(np.float32)
        changed_codes, changed_scale = quantise_numpy(before + change)
        touched = change.reshape(len(change), -1, GROUP_SIZE).any(axis=-1)
        new_scale[rows] = np.where(touched, changed_scale, scale[rows])
        codes = np.where(touched.repeat(GROUP_SIZE, axis=-1), changed_codes, codes)
        new_words[rows] = pack_numpy(codes)
        after = dequantise_numpy(codes, new_scale[rows]).astype(np.float32)
        survival = survival.plus(compare(change, after - before))
    return new_words, new_scale, survival


def unpack_to_bf16(
    words: Int32[np.ndarray, "out words"], scale: Shaped[np.ndarray, "out groups"]
) -> Shaped[np.ndarray, "out in"]:
    """A packed weight as the bf16 values that every reader of it computes with."""
    return dequantise_numpy(unpack_numpy(words), scale)


def compare(
    intended: Float[np.ndarray, "out in"], realised: Float[np.ndarray, "out in"]
) -> Survival:
    """Products are summed in fp32 along rows and in fp64 over them."""

    def dot(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.einsum("oi,oi->o", x, y).sum(dtype=np.float64))

    return Survival(dot(intended, intended), dot(realised, realised), dot(realised, intended))


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _BLOCK // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
