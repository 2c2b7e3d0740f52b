"""What goes on inside a forward pass, layer by layer: for looking, at small sizes.

Everything that training never keeps is kept here: attention scores of every head, the router's choice
for every token, and the residual stream after each layer. Memory grows with the square of the length.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.model.attention import LatentAttention
from kimi_jax.model.layer import Layer, scan_stack
from kimi_jax.model.moe import MixtureOfExperts
from kimi_jax.model.transformer import Transformer, check_tokens


class LayerView(NamedTuple):
    """One layer's part of a forward pass.

    scores: [B, N, T, S] q · k before any scale, fp32; -inf where the key is not visible, so that
    `softmax(scores * config.softmax_scale)` is what the layer attends with.
    latent: [B, T, C] and rope_key: [B, T, R], what a cache holds of the layer.
    experts: [B, T, K] int32 and weights: [B, T, K] fp32, the router's choice (K = 0 in a dense layer).
    load: [E] int32 assignments of the counted tokens ([0] in a dense layer).
    residual: [B, T, D] after the layer.
    """

    scores: Float[Array, "B N T S"]
    latent: Float[Array, "B T C"]
    rope_key: Float[Array, "B T R"]
    experts: Int[Array, "B T K"]
    weights: Float[Array, "B T K"]
    load: Int[Array, " E"]
    residual: Float[Array, "B T D"]


def tour(
    model: Transformer,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
) -> list[LayerView]:
    """A view of every layer, first to last, of one forward pass.

    Args:
        model: from `kimi_jax.load`, or a trainer's `model`.
        tokens: int32 ids, [B, T].
        positions: 0, 1, 2, … in every row if not given.
        segment_ids: one segment a row if not given; 0 is padding, which `load` does not count.

    Raises:
        UserError: ids outside the vocabulary, or a model that is spread over devices.
    """
    if model.settings.ranks.mesh is not None:
        raise UserError("the model is spread over several devices; a tour needs it on one")
    check_tokens(tokens, model.config)
    shape = tokens.shape
    if positions is None:
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if segment_ids is None:
        segment_ids = np.ones(shape, np.int32)
    graph, state = nnx.split(model)
    stacks = _walk(graph, state, *(jnp.asarray(x) for x in (tokens, positions, segment_ids)))
    return [
        jax.tree.map(lambda values, n=layer: values[n], stack)
        for stack in stacks
        for layer in range(len(stack.residual))
    ]


@partial(jax.jit, static_argnums=0)
def _walk(
    graph: Any, state: Any, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array
) -> list[LayerView]:
    """Views of the layers of each stack, stacked."""
    model: Transformer = nnx.merge(graph, state)
    x_BTD = model.embed(tokens_BT, whole=False)

    def apply(layer: Layer, x_BTD: Array, _: None, number: Array) -> tuple[Array, LayerView]:
        normed = layer.input_layernorm(x_BTD)
        attention = layer.self_attn
        scores, latent, rope_key = _scores(attention, normed, positions_BT, segment_ids_BT)
        between = x_BTD + attention(normed, positions_BT, segment_ids_BT)
        experts, weights = _choice(layer, between)
        after, load = layer(x_BTD, positions_BT, segment_ids_BT, number)
        return after, LayerView(scores, latent, rope_key, experts, weights, load, after)

    views = []
    for stack in (model.dense_layers, model.moe_layers):
        if stack is not None:
            x_BTD, seen = scan_stack(stack, apply, x_BTD, None, "none")
            views.append(seen)
    return views


def _scores(
    attention: LatentAttention, x_BTD: Array, positions_BT: Array, segment_ids_BT: Array
) -> tuple[Array, Array, Array]:
    """Masked products of queries and keys [B, N, T, S], the normed latents, and the rotated shared key."""
    config = attention.config
    q_nope, q_rope = attention.queries(x_BTD, positions_BT)
    latent, rope_key = attention.latents(x_BTD, positions_BT)
    heads = attention.kv_b_proj(latent).reshape(*q_nope.shape[:3], -1)
    k_nope = heads[..., : config.qk_nope_head_dim]
    f32 = jnp.float32
    scores = jnp.einsum("btnh,bsnh->bnts", q_nope, k_nope, preferred_element_type=f32)
    scores += jnp.einsum("btnr,bsr->bnts", q_rope, rope_key, preferred_element_type=f32)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    same_segment = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jnp.where((causal & same_segment)[:, None], scores, -jnp.inf), latent, rope_key


def _choice(layer: Layer, x_BTD: Array) -> tuple[Array, Array]:
    """Experts and weights [B, T, K] that the layer's router gives behind its attention."""
    batch, length, hidden = x_BTD.shape
    if not isinstance(layer.mlp, MixtureOfExperts):
        empty = (batch, length, 0)
        return jnp.zeros(empty, jnp.int32), jnp.zeros(empty, jnp.float32)
    routing = layer.mlp.gate(layer.post_attention_layernorm(x_BTD).reshape(-1, hidden))
    return (
        routing.experts.reshape(batch, length, -1),
        routing.weights.reshape(batch, length, -1),
    )
