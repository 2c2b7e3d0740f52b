"""What fast attention keeps from the forward to the backward pass, and how recomputation can name it."""

from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

OUTPUT_NAME, LOGSUMEXP_NAME = "attention_output", "attention_logsumexp"


class Saved(NamedTuple):
    """What the backward pass gets: what the forward pass got and what it gave."""

    operands: tuple[Array, ...]
    segment_ids: Array
    out: Array
    logsumexp: Array


class AttentionKernel(Protocol):
    """One implementation's two passes, over the operands that it takes."""

    def forward(
        self, operands: tuple[Array, ...], segment_ids: Array, scale: float
    ) -> tuple[Array, Array]:
        """Output [B, T, N, U] and the logarithms of the softmax's denominators, fp32 [B, N, T]."""
        ...

    def backward(self, saved: Saved, d_out: Array, scale: float) -> tuple[Array, ...]:
        """The operands' cotangents. Nothing flows back from padding."""
        ...


def attention(
    kernel: AttentionKernel,
    operands: tuple[Array, ...],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N U"]:
    """A kernel as a differentiable function of its operands.

    It keeps them, the output and one fp32 number a query and head. The two last carry the names
    `attention_output` and `attention_logsumexp`: a checkpoint policy that saves both spares the
    backward pass the forward kernel.
    """
    return cast(Array, _attention(kernel, scale, operands, segment_ids_BT))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    kernel: AttentionKernel, scale: float, operands: tuple[Array, ...], segment_ids: Array
) -> Array:
    return kernel.forward(operands, segment_ids, scale)[0]


def _forward(
    kernel: AttentionKernel, scale: float, operands: tuple[Array, ...], segment_ids: Array
) -> tuple[Array, Saved]:
    out, logsumexp = kernel.forward(operands, segment_ids, scale)
    out = checkpoint_name(out, OUTPUT_NAME)
    logsumexp = checkpoint_name(logsumexp, LOGSUMEXP_NAME)
    return out, Saved(operands, segment_ids, out, logsumexp)


def _backward(
    kernel: AttentionKernel, scale: float, saved: Saved, d_out: Array
) -> tuple[tuple[Array, ...], None]:
    return kernel.backward(saved, d_out, scale), None


_attention.defvjp(_forward, _backward)
