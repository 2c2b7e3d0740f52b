"""Attention in plain JAX with every score in memory: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def widths(
    q_BTNH: Float[Array, "B T N qk"],
    kv_BTNH: Float[Array, "B T N kv"],
    rope_key_BTR: Float[Array, "B T R"],
) -> tuple[int, int, int]:
    """Of a head's keys without position, of the rotated part, and of values."""
    rope = rope_key_BTR.shape[-1]
    nope = q_BTNH.shape[-1] - rope
    return nope, rope, kv_BTNH.shape[-1] - nope


def keys_and_values(
    kv_BTNH: Float[Array, "B T N kv"], rope_key_BTR: Float[Array, "B T R"], nope: int
) -> tuple[Float[Array, "B T N qk"], Float[Array, "B T N U"]]:
    """Every head's whole keys, the shared part behind its own of width `nope`, and its values."""
    k_nope, values = jnp.split(kv_BTNH, [nope], axis=-1)
    shared = jnp.broadcast_to(
        rope_key_BTR[:, :, None], (*kv_BTNH.shape[:3], rope_key_BTR.shape[-1])
    )
    return jnp.concatenate([k_nope, shared], axis=-1), values


def attention(
    q_BTNH: Float[Array, "B T N qk"],
    kv_BTNH: Float[Array, "B T N kv"],
    rope_key_BTR: Float[Array, "B T R"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N U"]:
    """Causal attention within segments; see `kimi_jax.kernels.api.latent_attention`.

    Scores and softmax are fp32; the probabilities are cast to the values' dtype before the product,
    as in HF's eager path.
    """
    nope, _, _ = widths(q_BTNH, kv_BTNH, rope_key_BTR)
    k_BTNH, v_BTNU = keys_and_values(kv_BTNH, rope_key_BTR, nope)
    scores = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH, preferred_element_type=jnp.float32)
    length = q_BTNH.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same_segment = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    visible = (causal & same_segment)[:, None]
    probabilities = jax.nn.softmax(jnp.where(visible, scores * scale, -jnp.inf), axis=-1)
    out = jnp.einsum(
        "bnts,bsnu->btnu",
        probabilities.astype(v_BTNU.dtype),
        v_BTNU,
        preferred_element_type=jnp.float32,
    )
    return out.astype(v_BTNU.dtype)
