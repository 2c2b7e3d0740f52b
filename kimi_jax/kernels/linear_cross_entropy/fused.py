"""Head and cross-entropy with the gradient made in the forward pass, whole or split by vocabulary.

The loss is a scalar, so its gradient is known up to a factor as soon as a chunk's logits are. Making
it then costs the products of forward and backward pass once each; making it later would form all
logits a second time. Nothing is computed for a frozen head, and no gradient where none is asked for.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.linear.joined import padded
from kimi_jax.kernels.types import LinearAdapter


class VocabularySplit(NamedTuple):
    """Inside `jax.shard_map`: this device has some consecutive rows of the head, its peers the others.

    axis_name: the mesh axis along which they are peers. first: the token id of this device's first
    row. own_tokens: whether each device brings tokens of its own; if not, all bring the same.
    """

    axis_name: str
    first: Int[Array, ""] | int
    own_tokens: bool = False


class _Chunk(NamedTuple):
    hidden: Array
    targets: Array
    weights: Array


class _Gradients(NamedTuple):
    """Of the loss. hidden is in the dtype of hidden, the others are fp32, or None without adapter."""

    hidden: Array
    a: Array | None
    b: Array | None


def linear_cross_entropy(
    hidden_TD: Float[Array, "T D"],
    weight_VD: Float[Array, "V D"],
    targets_T: Int[Array, " T"],
    loss_weights_T: Float[Array, " T"],
    adapter: LinearAdapter | None = None,
    chunk: int = 1024,
    split: VocabularySplit | None = None,
) -> Float[Array, ""]:
    """Weighted sum of -log p(target) in fp32 nats; see `kimi_jax.kernels.api.linear_cross_entropy`.

    Differentiable in `hidden_TD` and the adapter's factors; the gradient of everything else is zero.

    With a split, `weight_VD` and the adapter's `b` are this device's rows, `targets_T` stay ids of
    the whole vocabulary, and the loss is that of this device's tokens. The gradients are those of
    the loss of all peers' tokens, whose cotangents have to be equal: complete for hidden and `b`;
    for `a` complete if all have the same tokens, this device's tokens' share if each has its own
    (add the shares up, as for any replicated parameter). `chunk` counts the tokens of one device.
    Use `check_vma=False`.
    """
    if adapter is None:
        factors, scale = None, 1.0
    else:
        factors, scale = (adapter.a, adapter.b), adapter.scale
    static = (chunk, split and split._replace(first=0))
    head = _Head(weight_VD, jnp.int32(split.first if split else 0), jnp.float32(scale))
    loss = _loss(static, hidden_TD, factors, head, targets_T, loss_weights_T)
    return cast(Array, loss)


class _Head(NamedTuple):
    """What is frozen. first: id of the first row. scale: of the adapter."""

    weight: Array
    first: Array
    scale: Array


_Static = tuple[int, VocabularySplit | None]
_Factors = tuple[Array, Array] | None  # a and b, or what belongs to them


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    static: _Static,
    hidden: Array,
    factors: _Factors,
    head: _Head,
    targets: Array,
    loss_weights: Array,
) -> Array:
    head = _joined(head, factors, hidden.dtype)

    def one(_: None, chunk: _Chunk) -> tuple[None, Array]:
        logits, chunk, _low = _logits(chunk, head, factors, static)
        return None, _statistics(logits, chunk, head.first, static)[0]

    chunks = _cut(hidden, targets, loss_weights, static[0])
    return lax.scan(one, None, chunks)[1].sum()


def _loss_forward(
    static: _Static,
    hidden: Array,
    factors: _Factors,
    head: _Head,
    targets: Array,
    loss_weights: Array,
) -> tuple[Array, _Gradients]:
    head = _joined(head, factors, hidden.dtype)

    def one(sums: _Factors, chunk: _Chunk) -> tuple[_Factors, tuple[Array, Array]]:
        logits, gathered, low = _logits(chunk, head, factors, static)
        loss, d_logits = _statistics(logits, gathered, head.first, static)
        d_hidden, sums = _pull_back(d_logits, chunk, head, factors, low, sums, static)
        return sums, (loss, d_hidden)

    sums = None if factors is None else tuple(jnp.zeros(f.shape, jnp.float32) for f in factors)
    chunks = _cut(hidden, targets, loss_weights, static[0])
    sums, (losses, d_hidden) = lax.scan(one, cast(_Factors, sums), chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return losses.sum(), _Gradients(d_hidden, *(sums or (None, None)))


def _loss_backward(
    static: _Static, gradients: _Gradients, d_loss: Array
) -> tuple[Array, _Factors, None, None, None]:
    hidden, a, b = (g if g is None else (d_loss * g).astype(g.dtype) for g in gradients)
    factors = None if a is None or b is None else (a, b)
    assert hidden is not None
    return hidden, factors, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _cut(hidden: Array, targets: Array, loss_weights: Array, chunk: int) -> _Chunk:
    """Chunks along a new first dimension; what fills the last one weighs nothing."""
    tokens = hidden.shape[0]
    chunk = max(min(chunk, tokens), 1)
    missing = -tokens % chunk
    return _Chunk(
        jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, chunk, hidden.shape[1]),
        jnp.pad(targets, (0, missing)).reshape(-1, chunk),
        jnp.pad(loss_weights, (0, missing)).reshape(-1, chunk),
    )


def _joined(head: _Head, factors: _Factors, dtype: jnp.dtype) -> _Head:
    """In this dtype, with the adapter's b as more columns: its logits are never an array of their own."""
    weight = head.weight.astype(dtype)
    if factors is not None:
        b = (head.scale * factors[1]).astype(dtype)
        weight = padded([weight, b], axis=1)
    return head._replace(weight=weight)


def _product(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _logits(
    chunk: _Chunk, head: _Head, factors: _Factors, static: _Static
) -> tuple[Array, _Chunk, Array | None]:
    """fp32 logits of this device's rows; the chunk with all peers' tokens; hidden · aᵀ of those.

    `head` is `_joined`.
    """
    _, split = static
    if split and split.own_tokens:
        chunk = _Chunk(*(lax.all_gather(v, split.axis_name, tiled=True) for v in chunk))
    rows, low = chunk.hidden, None
    if factors is not None:
        low = _product("td,rd->tr", rows, factors[0].astype(rows.dtype)).astype(rows.dtype)
        rows = padded([rows, low], axis=1)
    return _product("td,vd->tv", rows, head.weight), chunk, low


def _statistics(logits: Array, chunk: _Chunk, first: Array, static: _Static) -> tuple[Array, Array]:
    """The loss of this device's tokens, and its gradient with respect to the logits."""
    _, split = static
    largest = logits.max(axis=-1)
    place = chunk.targets - first
    here = (place >= 0) & (place < logits.shape[1])
    target = jnp.take_along_axis(logits, jnp.where(here, place, 0)[:, None], axis=-1)[:, 0]
    if split:
        largest = lax.pmax(largest, split.axis_name)
        target = lax.psum(jnp.where(here, target, 0.0), split.axis_name)
    denominator = jnp.exp(logits - largest[:, None]).sum(axis=-1)
    if split:
        denominator = lax.psum(denominator, split.axis_name)
    logsumexp = largest + jnp.log(denominator)
    # A weight of zero says "not part of the loss", also where the loss is not finite.
    counts = chunk.weights != 0
    losses = jnp.where(counts, chunk.weights * (logsumexp - target), 0.0)
    is_target = jnp.arange(logits.shape[1]) == place[:, None]
    d_logits = (jnp.exp(logits - logsumexp[:, None]) - is_target) * chunk.weights[:, None]
    d_logits = jnp.where(counts[:, None], d_logits, 0.0).astype(chunk.hidden.dtype)
    return _own(losses, split).sum(), d_logits


def _pull_back(
    d_logits: Array,
    chunk: _Chunk,
    head: _Head,
    factors: _Factors,
    low: Array | None,
    sums: _Factors,
    static: _Static,
) -> tuple[Array, _Factors]:
    """The gradient of this device's hidden states, and the factors' with this chunk's added."""
    _, split = static
    dtype, width = chunk.hidden.dtype, chunk.hidden.shape[1]
    d_joined = _product("tv,vd->td", d_logits, head.weight)
    d_hidden = d_joined[:, :width]
    if split and split.own_tokens:
        d_hidden = lax.psum_scatter(d_hidden, split.axis_name, tiled=True)
    elif split:
        d_hidden = lax.psum(d_hidden, split.axis_name)
    if factors is not None:
        assert low is not None
        assert sums is not None
        a = factors[0].astype(dtype)
        d_low = d_joined[:, width : width + a.shape[0]]
        if split:
            d_low = lax.psum(d_low, split.axis_name)
        d_low = _own(d_low, split).astype(dtype)
        d_hidden += _product("tr,rd->td", d_low, a)
        sums = (
            sums[0] + _product("tr,td->rd", d_low, chunk.hidden),
            sums[1] + head.scale * _product("tv,tr->vr", d_logits, low),
        )
    return d_hidden.astype(dtype), sums


def _own(values: Array, split: VocabularySplit | None) -> Array:
    """This device's part of what was made for all peers' tokens."""
    if not (split and split.own_tokens):
        return values
    size = values.shape[0] // lax.axis_size(split.axis_name)
    return lax.dynamic_slice_in_dim(values, lax.axis_index(split.axis_name) * size, size)
