"""Head and cross-entropy in plain JAX, chunk by chunk: the logits of a whole batch never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.types import LinearAdapter


def linear_cross_entropy(
    hidden_TD: Float[Array, "T D"],
    weight_VD: Float[Array, "V D"],
    targets_T: Int[Array, " T"],
    loss_weights_T: Float[Array, " T"],
    adapter: LinearAdapter | None,
    chunk: int,
) -> Float[Array, ""]:
    """Weighted sum of -log p(target); see `kimi_jax.kernels.api.linear_cross_entropy`."""
    tokens = hidden_TD.shape[0]
    chunk = max(min(chunk, tokens), 1)
    missing = -tokens % chunk
    chunks = (
        jnp.pad(hidden_TD, ((0, missing), (0, 0))).reshape(-1, chunk, hidden_TD.shape[1]),
        jnp.pad(targets_T, (0, missing)).reshape(-1, chunk),
        jnp.pad(loss_weights_T, (0, missing)).reshape(-1, chunk),
    )

    @jax.checkpoint
    def add_chunk(total: Array, one: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, weights = one
        logits = head_logits(hidden, weight_VD, adapter)
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - target_logits
        # A weight of zero says "not part of the loss", also where the loss is not finite.
        return total + jnp.sum(jnp.where(weights == 0, 0.0, weights * nll)), None

    total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)
    return total


def head_logits(
    hidden: Float[Array, "*tokens D"], weight_VD: Float[Array, "V D"], adapter: LinearAdapter | None
) -> Float[Array, "*tokens V"]:
    """Logits in fp32: hidden · Wᵀ, plus the head's adapter."""
    weight = weight_VD.astype(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    if adapter is not None:
        a, b = adapter.a.astype(hidden.dtype), adapter.b.astype(hidden.dtype)
        low = jnp.einsum("...d,rd->...r", hidden, a, preferred_element_type=jnp.float32)
        logits += adapter.scale * jnp.einsum(
            "...r,vr->...v", low.astype(hidden.dtype), b, preferred_element_type=jnp.float32
        )
    return logits
