"""What fast attention keeps from the forward to the backward pass, and how recomputation can name it."""

from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

OUTPUT_NAME, LOGSUMEXP_NAME = "attention_output", "attention_logsumexp"


class Gradients(NamedTuple):
    """Cotangents of queries, keys and values."""

    q: Array
    k: Array
    v: Array


class AttentionKernel(Protocol):
    """One implementation's two passes."""

    def forward(
        self, q: Array, k: Array, v: Array, segment_ids: Array, scale: float
    ) -> tuple[Array, Array]:
        """Output [B, T, N, U] and the logarithms of the softmax's denominators, fp32 [B, N, T]."""
        ...

    def backward(
        self,
        saved: tuple[Array, Array, Array, Array, Array, Array],
        d_out: Array,
        scale: float,
    ) -> Gradients:
        """Of `saved`: q, k, v, segment ids, output, logarithms. Nothing flows back from padding."""
        ...


def attention(
    kernel: AttentionKernel,
    q_BTNH: Float[Array, "B T N qk"],
    k_BTNH: Float[Array, "B T N qk"],
    v_BTNU: Float[Array, "B T N U"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N U"]:
    """A kernel as a differentiable function of queries, keys and values.

    It keeps them, the output and one fp32 number a query and head. The two last carry the names
    `attention_output` and `attention_logsumexp`: a checkpoint policy that saves both spares the
    backward pass the forward kernel.
    """
    out = _attention(kernel, scale, q_BTNH, k_BTNH, v_BTNU, segment_ids_BT)
    return cast(Array, out)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    kernel: AttentionKernel, scale: float, q: Array, k: Array, v: Array, segment_ids: Array
) -> Array:
    return kernel.forward(q, k, v, segment_ids, scale)[0]


def _forward(
    kernel: AttentionKernel, scale: float, q: Array, k: Array, v: Array, segment_ids: Array
) -> tuple[Array, tuple[Array, ...]]:
    out, logsumexp = kernel.forward(q, k, v, segment_ids, scale)
    out = checkpoint_name(out, OUTPUT_NAME)
    logsumexp = checkpoint_name(logsumexp, LOGSUMEXP_NAME)
    return out, (q, k, v, segment_ids, out, logsumexp)


def _backward(
    kernel: AttentionKernel,
    scale: float,
    saved: tuple[Array, Array, Array, Array, Array, Array],
    d_out: Array,
) -> tuple[Array, Array, Array, None]:
    gradients = kernel.backward(saved, d_out, scale)
    return gradients.q, gradients.k, gradients.v, None


_attention.defvjp(_forward, _backward)
