"""The kernels by their contract; the implementation behind each can be chosen.

A named implementation runs or raises; `impl="auto"` takes the fastest that fits the device and the
operands, as the `choice` module beside each kernel says, and logs once what it took.
"""

from typing import Any, Literal, get_args

from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.kernels.grouped_matmul import reference as grouped_reference
from kimi_jax.kernels.grouped_matmul.choice import choose as choose_grouped
from kimi_jax.kernels.linear import joined as linear_joined
from kimi_jax.kernels.linear import reference as linear_reference
from kimi_jax.kernels.linear_cross_entropy import fused as cross_entropy_fused
from kimi_jax.kernels.linear_cross_entropy import reference as cross_entropy_reference
from kimi_jax.kernels.linear_cross_entropy.fused import VocabularySplit
from kimi_jax.kernels.mla_attention import reference as attention_reference
from kimi_jax.kernels.mla_attention.choice import choose as choose_attention
from kimi_jax.kernels.recall import recalled
from kimi_jax.kernels.types import GroupedAdapter, GroupedWeight, LinearAdapter, PackedWeight

GroupedImplementation = Literal["auto", "reference", "pallas", "scratch"]
AttentionImplementation = Literal["auto", "reference", "cudnn", "pallas"]
CrossEntropyImplementation = Literal["auto", "reference", "fused"]
LinearImplementation = Literal["auto", "reference", "joined"]


def grouped_matmul(
    x_AI: Float[Array, "A in"],
    weight: GroupedWeight,
    group_sizes_E: Int[Array, " E"],
    adapter: GroupedAdapter | None = None,
    impl: GroupedImplementation = "auto",
    layer: Int[Array, ""] | int | None = None,
    low: Float[Array, "A r"] | None = None,
) -> Float[Array, "A out"]:
    """y[a] = x[a] · W[g(a)]ᵀ, plus the adapter of g(a), for rows sorted by group.

    Args:
        x_AI: rows, fp32 or bf16; the product has their dtype and is accumulated in fp32.
        weight: [E, out, in], packed int4 or floating.
        group_sizes_E: rows of each group, int32, known on the device only; they sum to A.
        adapter: factors of the groups; differentiable, as the rows are. Packed weights are not.
        impl: `reference`; `pallas`, which multiplies by packed int4 on Hopper GPUs; `scratch`, which
            decodes all groups to bf16 there first; `auto`, see `grouped_matmul.choice`.
        layer: int32, may be traced: the weight's arrays are then stacks with a leading dimension of
            layers, of which this one is multiplied by; `pallas` reads it in place.
        low: what `grouped_low_rank` gave for the same operands, if it was asked.

    Raises:
        UserError: an unknown implementation, or operands that the named one does not take.
    """
    _check(impl, GroupedImplementation)
    _check_layers(weight, layer)
    if impl == "auto":
        impl = choose_grouped(x_AI, weight, adapter)
    # Imported when they are asked for: both bring in Mosaic GPU, which a CPU has no use for.
    if impl == "pallas":
        from kimi_jax.kernels.grouped_matmul import mosaic

        return mosaic.grouped_matmul(x_AI, weight, group_sizes_E, adapter, layer, low=low)
    assert low is None, f"{impl} makes no use of it"
    if impl == "scratch":
        from kimi_jax.kernels.grouped_matmul import scratch

        return scratch.grouped_matmul(x_AI, weight, group_sizes_E, adapter, layer)
    return grouped_reference.grouped_matmul(x_AI, weight, group_sizes_E, adapter, layer)


def grouped_matmul_pair(
    x_AI: Float[Array, "A in"],
    weights: tuple[GroupedWeight, GroupedWeight],
    group_sizes_E: Int[Array, " E"],
    adapters: tuple[GroupedAdapter | None, GroupedAdapter | None] = (None, None),
    impl: GroupedImplementation = "auto",
    layer: Int[Array, ""] | int | None = None,
    known: tuple[Float[Array, "A out1"], Float[Array, "A out2"]] | None = None,
    low: Float[Array, "A r"] | None = None,
) -> tuple[Float[Array, "A out1"], Float[Array, "A out2"]]:
    """Two `grouped_matmul` of the same rows, as an expert's gate and up.

    `pallas` reads the rows once for both adapters in the forward pass and once in the backward pass,
    and makes the gradient of the rows in one product, summed in fp32 before it is rounded; the other
    implementations multiply twice. Arguments are those of `grouped_matmul`, of each product. The
    adapters may differ in rank, scale and sharing, and either may be missing. Products that an earlier
    call has made may be given as `known`: they come back as they are, differentiated as products. `low`
    is what `grouped_low_rank` gave for both, if it was asked.

    Raises:
        UserError: an unknown implementation, or operands that the named one does not take.
    """
    _check(impl, GroupedImplementation)
    if known is not None:
        scales = [adapter and adapter.scale for adapter in adapters]
        factors = [adapter and (adapter.a, adapter.b) for adapter in adapters]

        def again(x_AI: Array, factors: list[tuple[Array, Array] | None]) -> tuple[Array, Array]:
            first, second = (
                pair and GroupedAdapter(*pair, scale or 0.0)
                for pair, scale in zip(factors, scales, strict=True)
            )
            operands = x_AI, weights, group_sizes_E, (first, second)
            return grouped_matmul_pair(*operands, impl, layer, low=low)

        return recalled(again, tuple(known), x_AI, factors)
    for weight in weights:
        _check_layers(weight, layer)
    chosen = _chosen(x_AI, weights, adapters, impl)
    if chosen == ["pallas", "pallas"]:
        # Imported when it is asked for, as above.
        from kimi_jax.kernels.grouped_matmul import mosaic

        return mosaic.grouped_matmul_pair(x_AI, weights, group_sizes_E, adapters, layer, low=low)
    assert low is None, f"{chosen} make no use of it"
    each = tuple(zip(weights, adapters, strict=True))
    first, second = (
        grouped_matmul(x_AI, weight, group_sizes_E, adapter, name, layer)
        for (weight, adapter), name in zip(each, chosen, strict=True)
    )
    return first, second


def grouped_low_rank(
    x_AI: Float[Array, "A in"],
    weights: tuple[GroupedWeight, ...],
    group_sizes_E: Int[Array, " E"],
    adapters: tuple[GroupedAdapter | None, ...],
    impl: GroupedImplementation = "auto",
) -> Float[Array, "A r"] | None:
    """What adapters make of the rows on the way to `grouped_matmul` or `grouped_matmul_pair`.

    It is small, and made by reading all rows: kept and given as `low` to those, it is not made again
    where they are differentiated once more. Not differentiable by itself; they are, with it or without.

    Returns:
        scale · x · Aᵀ of all adapters beside each other, or None where the implementation makes no
        such thing or there is no adapter. `low` is then None as well.
    """
    _check(impl, GroupedImplementation)
    if set(_chosen(x_AI, weights, adapters, impl)) != {"pallas"}:
        return None
    # Imported when it is asked for, as above.
    from kimi_jax.kernels.grouped_matmul import mosaic

    return mosaic.low_rank(x_AI, group_sizes_E, adapters)


def _chosen(
    x_AI: Array,
    weights: tuple[GroupedWeight, ...],
    adapters: tuple[GroupedAdapter | None, ...],
    impl: GroupedImplementation,
) -> list[GroupedImplementation]:
    """The implementation of each product."""
    return [
        choose_grouped(x_AI, weight, adapter) if impl == "auto" else impl
        for weight, adapter in zip(weights, adapters, strict=True)
    ]


def latent_attention(
    q_BTNH: Float[Array, "B T N qk"],
    kv_BTNH: Float[Array, "B T N kv"],
    rope_key_BTR: Float[Array, "B T R"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
    impl: AttentionImplementation = "auto",
    packed: bool = True,
) -> Float[Array, "B T N U"]:
    """softmax(q · kᵀ · scale) · v over the keys at or before the query in the same segment.

    Operands are as multi-head latent attention has them, so that nothing is copied together: a
    head's own part of its keys beside its values, and the rotated part, which the heads share.
    Segment 0 is padding: it changes nothing for others, and what it puts out is finite and means
    nothing. With `cudnn` and `pallas` no gradient flows back from it.

    Args:
        q_BTNH: queries, `qk` = nope + rope wide, the rotated part last.
        kv_BTNH: what `kv_b_proj` gives: nope of keys, then values; `kv` = nope + values' width.
        rope_key_BTR: the rotated part of the keys.
        segment_ids_BT: int32; tokens see only tokens of their own segment (and row).
        scale: of the scores, YaRN's multiplier included.
        impl: `reference`; on Hopper GPUs `cudnn`, for bf16 rows of one segment, or `pallas`, for
            bf16 rows of any number of contiguous segments; `auto`, see `mla_attention.choice`.
        packed: whether a row may hold more than one segment; `cudnn` wants the promise that each
            row is one segment, and then perhaps padding.

    Raises:
        UserError: an unknown implementation, or operands that the named one does not take.
    """
    _check(impl, AttentionImplementation)
    operands = q_BTNH, kv_BTNH, rope_key_BTR
    if impl == "auto":
        impl = choose_attention(*operands)
    # Imported when they are asked for, as above.
    if impl == "pallas":
        from kimi_jax.kernels.mla_attention import mosaic

        return mosaic.attention(*operands, segment_ids_BT, scale)
    if impl == "cudnn":
        if packed:
            raise UserError(
                "impl is 'cudnn' and rows may hold several segments; required: packed=False, "
                "with one segment a row. Use impl='pallas' for packed rows"
            )
        from kimi_jax.kernels.mla_attention import cudnn

        return cudnn.attention(*operands, segment_ids_BT, scale)
    return attention_reference.attention(*operands, segment_ids_BT, scale)


def linear(
    x: Float[Array, "*tokens in"],
    weights: tuple[Float[Array, "_ in"], ...],
    adapters: tuple[LinearAdapter | None, ...],
    impl: LinearImplementation = "auto",
) -> tuple[Float[Array, "*tokens _"], ...]:
    """y = x · Wᵀ for each of several weights, plus its adapter's term, for the same rows.

    Differentiable in the rows and the factors; the weights are frozen.

    Args:
        x: rows, fp32 or bf16; products have their dtype and are accumulated in fp32.
        weights: converted to the rows' dtype.
        adapters: of each weight, or None.
        impl: `reference`; `joined`, which computes adapters' terms within the weights' products; `auto`
            is the latter everywhere.

    Raises:
        UserError: an unknown implementation.
    """
    _check(impl, LinearImplementation)
    module = linear_reference if impl == "reference" else linear_joined
    return module.linear(x, weights, adapters)


def linear_cross_entropy(
    hidden_TD: Float[Array, "T D"],
    weight_VD: Float[Array, "V D"],
    targets_T: Int[Array, " T"],
    loss_weights_T: Float[Array, " T"],
    adapter: LinearAdapter | None = None,
    chunk: int = 1024,
    impl: CrossEntropyImplementation = "auto",
    split: VocabularySplit | None = None,
) -> Float[Array, ""]:
    """Σ weight · -log softmax(hidden · Wᵀ)[target], in fp32 nats; at most `chunk` tokens' logits exist.

    Differentiable in the hidden states and the adapter's factors; the head is frozen.

    Args:
        hidden_TD: final hidden states, after the norm.
        weight_VD: the head, or this device's rows of it.
        targets_T: token ids.
        loss_weights_T: fp32 weight of each target.
        adapter: of the head, if it is adapted.
        chunk: tokens at a time.
        impl: `reference`, or `fused`, which makes the gradient in the forward pass; `auto` is the
            latter everywhere.
        split: how the head's rows are spread over a mesh axis, inside `jax.shard_map`; what the loss
            and its gradients then are, `fused.linear_cross_entropy` says.

    Raises:
        UserError: an unknown implementation, or the reference with a split.
    """
    _check(impl, CrossEntropyImplementation)
    operands = hidden_TD, weight_VD, targets_T, loss_weights_T, adapter, chunk
    if impl != "reference":
        return cross_entropy_fused.linear_cross_entropy(*operands, split)
    if split is not None:
        raise UserError(
            "impl is 'reference', which has the whole vocabulary on one device; a split was given"
        )
    return cross_entropy_reference.linear_cross_entropy(*operands)


head_logits = cross_entropy_reference.head_logits


def _check_layers(weight: GroupedWeight, layer: Array | int | None) -> None:
    values = weight.values if isinstance(weight, PackedWeight) else weight
    assert values.ndim == (3 if layer is None else 4), f"weight {values.shape}, layer {layer}"


def _check(impl: str, known: Any) -> None:
    if impl not in get_args(known):
        raise UserError(f"impl is {impl!r}; required: one of {', '.join(get_args(known))}")
