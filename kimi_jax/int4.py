"""The pack-quantized format of Kimi-K2-Thinking's routed experts.

Weights are integers q in [-8, 7] with one bf16 scale for each group of 32 along the input dimension.
On disk (`compressed-tensors`, format `pack-quantized`) eight of them share an int32 word: value j of
a row is in word j // 8 at bits 4·(j mod 8) and up, stored as q + 8. `weight = q · scale`, rounded to
bf16. On devices they are `jnp.int4` (two's complement), which is the same bits with the top bit of
each nibble flipped.

Functions ending in `_numpy` run on the host and are used for files; the others are traceable.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, BFloat16, Int, Int4, Int32, Shaped

GROUP_SIZE = 32
VALUES_PER_WORD = 8
# Moonshot's quantisation-aware training uses 15 of the 16 levels: scale = absmax / 7, codes -7..7.
LARGEST_CODE = 7
SMALLEST_SCALE = 1e-5  # floor for a group of zeros
OFFSET_BITS = 0x88888888


def words_to_int4(words: Int32[Array, "*rows words"]) -> Int4[Array, "*rows values"]:
    """Packed words of a checkpoint to device int4, on the device: [..., in/8] to [..., in].

    Flipping the top bit of each nibble turns "value + 8" into two's complement, so the rest is a
    reinterpretation of the same bytes, low nibble first.
    """
    flipped = jax.lax.bitcast_convert_type(words, jnp.uint32) ^ jnp.uint32(OFFSET_BITS)
    nibbles = jax.lax.bitcast_convert_type(flipped, jnp.int4)
    return nibbles.reshape(*words.shape[:-1], words.shape[-1] * VALUES_PER_WORD)


def int4_to_words(values: Int4[Array, "*rows values"]) -> Int32[Array, "*rows words"]:
    """The inverse of `words_to_int4`: device int4 [..., in] to the checkpoint's words [..., in/8]."""
    grouped = values.reshape(*values.shape[:-1], -1, VALUES_PER_WORD)
    words = jax.lax.bitcast_convert_type(grouped, jnp.uint32) ^ jnp.uint32(OFFSET_BITS)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def dequantise(
    values: Int4[Array, "*experts out in"], scale: BFloat16[Array, "*experts groups out"]
) -> BFloat16[Array, "*experts out in"]:
    """q · scale in fp32, rounded to bf16: bit for bit what compressed-tensors computes.

    Args:
        values: int4 [..., out, in].
        scale: bf16 [..., in/32, out] (group-major: the layout the kernels read).
    """
    scale_by_row = jnp.swapaxes(scale, -1, -2).astype(jnp.float32)
    spread = jnp.repeat(scale_by_row, GROUP_SIZE, axis=-1)
    return (values.astype(jnp.float32) * spread).astype(jnp.bfloat16)


def unpack_numpy(words: Int32[np.ndarray, "*rows words"]) -> Int[np.ndarray, "*rows values"]:
    """Words [..., in/8] to int8 codes in [-8, 7], [..., in], on the host."""
    shifts = np.arange(VALUES_PER_WORD, dtype=np.uint32) * 4
    nibbles = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(0xF)
    return (nibbles.astype(np.int8) - 8).reshape(*words.shape[:-1], -1)


def pack_numpy(codes: Int[np.ndarray, "*rows values"]) -> Int32[np.ndarray, "*rows words"]:
    """Codes in [-8, 7], [..., in], to words [..., in/8], on the host."""
    assert codes.min(initial=0) >= -8, "int4 codes must be at least -8"
    assert codes.max(initial=0) <= 7, "int4 codes must be at most 7"
    nibbles = (codes.astype(np.int16) + 8).astype(np.uint32)
    nibbles = nibbles.reshape(*codes.shape[:-1], -1, VALUES_PER_WORD)
    shifts = np.arange(VALUES_PER_WORD, dtype=np.uint32) * 4
    return np.bitwise_or.reduce(nibbles << shifts, axis=-1).astype(np.uint32).view(np.int32)


def dequantise_numpy(
    codes: Int[np.ndarray, "*rows values"], scale: Shaped[np.ndarray, "*rows groups"]
) -> Shaped[np.ndarray, "*rows values"]:
    """Codes [..., in] and a file's bf16 scales [..., in/32] to bf16 weights, on the host."""
    spread = np.repeat(scale.astype(np.float32), GROUP_SIZE, axis=-1)
    return (codes.astype(np.float32) * spread).astype(ml_dtypes.bfloat16)


def quantise_numpy(
    weight: Shaped[np.ndarray, "*rows values"],
) -> tuple[Int[np.ndarray, "*rows values"], Shaped[np.ndarray, "*rows groups"]]:
    """Moonshot's rule: per group of 32, scale = max(absmax / 7, 1e-5) in bf16, round to nearest, clamp to ±7.

    All arithmetic is fp32: in bf16 about 0.5 % of the codes would differ. The codes are taken
    against the rounded scale, the one that a reader will multiply by.

    Args:
        weight: any float dtype, [..., in], `in` divisible by 32.

    Returns:
        int8 codes [..., in] in [-7, 7] and bf16 scales [..., in/32].
    """
    groups = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, GROUP_SIZE)
    absmax = np.abs(groups).max(axis=-1)
    scale = np.maximum(absmax / LARGEST_CODE, SMALLEST_SCALE).astype(ml_dtypes.bfloat16)
    codes = np.rint(groups / scale.astype(np.float32)[..., None])
    codes = np.clip(codes, -LARGEST_CODE, LARGEST_CODE).astype(np.int8)
    return codes.reshape(weight.shape), scale
