"""Attention in plain JAX with every score in memory: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    q_BTNH: Float[Array, "B T N qk"],
    k_BTNH: Float[Array, "B T N qk"],
    v_BTNU: Float[Array, "B T N U"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N U"]:
    """Causal attention within segments; see `kimi_jax.kernels.api.attention`.

    Scores and softmax are fp32; the probabilities are cast to the values' dtype before the product,
    as in HF's eager path.
    """
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
