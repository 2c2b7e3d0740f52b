"""Rotary positions with YaRN, on interleaved pairs.

Pairs are the neighbours (x0, x1), (x2, x3), …, as the released weights are laid out, so no weight is
permuted. YaRN's frequencies are static: they apply from position 0 on (arXiv:2309.00071).
"""

import math
from typing import cast

import jax
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

    Columns before them stay as they are.
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
    return cast(Array, _turn(x, own[:, :, None], other[:, :, None]))


@jax.custom_vjp
def _turn(x: Array, own: Array, other: Array) -> Array:
    """The last columns replaced in place: others are neither read nor written, in either direction."""
    first = x.shape[-1] - own.shape[-1]
    precise = x[..., first:].astype(jnp.float32)
    swapped = precise.reshape(*precise.shape[:-1], -1, 2)[..., ::-1].reshape(precise.shape)
    turned = (precise * own + swapped * other).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, turned, first, axis=-1) if first else turned


def _turn_forward(x: Array, own: Array, other: Array) -> tuple[Array, tuple[Array, Array]]:
    return cast(Array, _turn(x, own, other)), (own, other)


def _turn_backward(factors: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    own, other = factors
    return cast(Array, _turn(dy, own, -other)), None, None  # the transpose of a rotation turns back


_turn.defvjp(_turn_forward, _turn_backward)
