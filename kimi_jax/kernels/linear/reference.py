"""Linear layers with adapters in plain JAX: the specification that faster implementations are compared with.

    y = x · Wᵀ + s · (x · Aᵀ) · Bᵀ

Products are accumulated in fp32 and rounded once each. Derivatives are JAX's own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.kernels.types import LinearAdapter


def linear(
    x: Float[Array, "*tokens in"],
    weights: tuple[Float[Array, "_ in"], ...],
    adapters: tuple[LinearAdapter | None, ...],
) -> tuple[Float[Array, "*tokens _"], ...]:
    """Each weight's product; see `kimi_jax.kernels.api.linear`."""
    return tuple(_one(x, *each) for each in zip(weights, adapters, strict=True))


def _one(x: Array, weight: Array, adapter: LinearAdapter | None) -> Array:
    y = product(x, weight)
    if adapter is not None:
        delta = adapter.scale * product(product(x, adapter.a), adapter.b).astype(jnp.float32)
        y = (y.astype(jnp.float32) + delta).astype(x.dtype)
    return y


def product(x: Array, weight_OI: Array) -> Array:
    """x · Wᵀ in x's dtype.

    Rounded, because the derivative of an fp32 product has an fp32 operand, which a GPU multiplies at
    half the rate or less.
    """
    return jnp.einsum("...i,oi->...o", x, weight_OI.astype(x.dtype))
