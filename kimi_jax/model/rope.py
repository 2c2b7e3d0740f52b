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
    x: Float[Array, "B T N width"], positions_BT: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T N width"]:
    """Rotates each pair of the last R columns by position · frequency; angles and products in fp32.

    Columns before them stay as they are. All is one elementwise pass over x, and one over its gradient.
    """
    angle = positions_BT[..., None].astype(jnp.float32) * frequencies(config)
    multiplier = 1.0
    if config.yarn is not None:
        multiplier = yarn_multiplier(config.yarn.factor, config.yarn.mscale) / yarn_multiplier(
            config.yarn.factor, config.yarn.mscale_all_dim
        )
    cos, sin = jnp.cos(angle) * multiplier, jnp.sin(angle) * multiplier
    # Of each column: what it is multiplied by, and what its pair's other column is.
    own = jnp.repeat(cos, 2, axis=-1)
    other = jnp.stack([-sin, sin], axis=-1).reshape(own.shape)
    before = ((0, 0), (0, 0), (x.shape[-1] - own.shape[-1], 0))
    own = jnp.pad(own, before, constant_values=1)[:, :, None]
    other = jnp.pad(other, before)[:, :, None]
    assert before[2][0] % 2 == 0, "columns that stay as they are come in pairs too"
    precise = x.astype(jnp.float32)
    swapped = precise.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (precise * own + swapped * other).astype(x.dtype)
