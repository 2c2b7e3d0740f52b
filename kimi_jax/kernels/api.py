"""The kernels by their contract; the implementation behind each can be chosen.

A named implementation runs or raises. `impl="auto"` is the reference throughout until the Hopper
kernels' final form has been measured on a GPU (LOG.md, 2026-11-21).
"""

from typing import Any, Literal, get_args

from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.kernels.grouped_matmul import reference as grouped_reference
from kimi_jax.kernels.linear_cross_entropy import reference as cross_entropy_reference
from kimi_jax.kernels.mla_attention import reference as attention_reference
from kimi_jax.kernels.types import GroupedAdapter, GroupedWeight, LinearAdapter, PackedWeight

Implementation = Literal["auto", "reference"]
GroupedImplementation = Literal["auto", "reference", "pallas", "scratch"]


def grouped_matmul(
    x_AI: Float[Array, "A in"],
    weight: GroupedWeight,
    group_sizes_E: Int[Array, " E"],
    adapter: GroupedAdapter | None = None,
    impl: GroupedImplementation = "auto",
) -> Float[Array, "A out"]:
    """y[a] = x[a] · W[g(a)]ᵀ, plus the adapter of g(a), for rows sorted by group.

    Args:
        x_AI: rows, fp32 or bf16; the product has their dtype and is accumulated in fp32.
        weight: [E, out, in], packed int4 or floating.
        group_sizes_E: rows of each group, int32, known on the device only; they sum to A.
        adapter: factors of the groups; differentiable, as the rows are. Packed weights are not.
        impl: `reference`; `pallas`, which multiplies by packed int4 on Hopper GPUs; `scratch`, which
            decodes all groups to bf16 there first and takes no adapter.

    Raises:
        UserError: an unknown implementation, or operands that the named one does not take.
    """
    _check(impl, GroupedImplementation)
    # Imported when they are asked for: both bring in Mosaic GPU, which a CPU has no use for.
    if impl == "pallas":
        from kimi_jax.kernels.grouped_matmul import mosaic

        return mosaic.grouped_matmul(x_AI, _packed(weight, impl), group_sizes_E, adapter)
    if impl == "scratch":
        from kimi_jax.kernels.grouped_matmul import scratch

        return scratch.grouped_matmul(x_AI, _packed(weight, impl), group_sizes_E, adapter)
    return grouped_reference.grouped_matmul(x_AI, weight, group_sizes_E, adapter)


def attention(
    q_BTNH: Float[Array, "B T N qk"],
    k_BTNH: Float[Array, "B T N qk"],
    v_BTNU: Float[Array, "B T N U"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
    impl: Implementation = "auto",
) -> Float[Array, "B T N U"]:
    """softmax(q · kᵀ · scale) · v over the keys at or before the query in the same segment.

    Args:
        q_BTNH: queries, `qk` = nope + rope wide.
        k_BTNH: keys.
        v_BTNU: values, which may be narrower.
        segment_ids_BT: int32; tokens see only tokens of their own segment (and row).
        scale: of the scores, YaRN's multiplier included.
        impl: which implementation.
    """
    _check(impl, Implementation)
    return attention_reference.attention(q_BTNH, k_BTNH, v_BTNU, segment_ids_BT, scale)


def linear_cross_entropy(
    hidden_TD: Float[Array, "T D"],
    weight_VD: Float[Array, "V D"],
    targets_T: Int[Array, " T"],
    loss_weights_T: Float[Array, " T"],
    adapter: LinearAdapter | None = None,
    chunk: int = 1024,
    impl: Implementation = "auto",
) -> Float[Array, ""]:
    """Σ weight · -log softmax(hidden · Wᵀ)[target], in fp32 nats; at most `chunk` tokens' logits exist.

    Args:
        hidden_TD: final hidden states, after the norm.
        weight_VD: the head.
        targets_T: token ids.
        loss_weights_T: fp32 weight of each target.
        adapter: of the head, if it is adapted.
        chunk: tokens at a time.
        impl: which implementation.
    """
    _check(impl, Implementation)
    return cross_entropy_reference.linear_cross_entropy(
        hidden_TD, weight_VD, targets_T, loss_weights_T, adapter, chunk
    )


head_logits = cross_entropy_reference.head_logits


def _check(impl: str, known: Any) -> None:
    if impl not in get_args(known):
        raise UserError(f"impl is {impl!r}; required: one of {', '.join(get_args(known))}")


def _packed(weight: GroupedWeight, impl: str) -> PackedWeight:
    if not isinstance(weight, PackedWeight):
        raise UserError(
            f"impl is {impl!r}, which multiplies by packed int4; the weight is not packed"
        )
    return weight
