"""Rotary positions with YaRN, on interleaved pairs.

Pairs are the neighbours (x0, x1), (x2, x3), …, as the released weights are laid out, so no weight is
permuted. YaRN's frequencies are static: they apply from position 0 on (arXiv:2309.00071).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kimi_jax.model.config import ModelConfig, yarn_multiplier


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position for each rotated pair, fp32 [R/2].

    With YaRN, pairs that turn more than `beta_fast` times within the original context keep their
    frequency, those that turn less than `beta_slow` times are slowed by `factor`, and a linear ramp
    lies between.
    """
    pairs = config.qk_rope_head_dim // 2
    plain = config.rope_theta ** -(np.arange(pairs, dtype=np.float32) / np.float32(pairs))
    yarn = config.yarn
    if yarn is None:
        return plain.astype(np.float32)

    def pair_that_turns(times: float) -> float:
        context = yarn.original_max_position_embeddings
        return pairs * math.log(context / (times * 2 * math.pi)) / math.log(config.rope_theta)

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), config.qk_rope_head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp defined, as in the reference implementation
    slowed = np.clip((np.arange(pairs, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain * (1 - slowed) + plain / yarn.factor * slowed).astype(np.float32)


def rotate(
    x: Float[Array, "B T N R"], positions_BT: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T N R"]:
    """Rotates each pair by position · frequency; angles and products in fp32."""
    angle = positions_BT[..., None].astype(jnp.float32) * frequencies(config)
    multiplier = 1.0
    if config.yarn is not None:
        multiplier = yarn_multiplier(config.yarn.factor, config.yarn.mscale) / yarn_multiplier(
            config.yarn.factor, config.yarn.mscale_all_dim
        )
    cos = (jnp.cos(angle) * multiplier)[:, :, None]
    sin = (jnp.sin(angle) * multiplier)[:, :, None]
    even = x[..., 0::2].astype(jnp.float32)
    odd = x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
