"""The whole model: embedding, a stack of dense layers, a stack of mixture-of-experts layers, head.

`ModelDef` describes a model without holding a value; `bind` gives it its two trees of values, the
frozen base and the adapters, which stay apart everywhere else.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kimi_jax.config import Recompute
from kimi_jax.errors import UserError
from kimi_jax.kernels import api as kernels
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.attention import LatentAttention, LatentCache
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.layers import Base, Linear, Norm, declare
from kimi_jax.model.moe import ROUTING, MixtureOfExperts, SwiGlu
from kimi_jax.model.params import Weight, weight_table

Values = Mapping[str, Any]  # arrays, or their shapes, by path


class ModelSettings(NamedTuple):
    """What the program, not the checkpoint, decides about the arithmetic."""

    dtype: Any = jnp.bfloat16
    latent_norm_eps: float = 1e-6
    recompute: Recompute = "layer"


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        rows: dict[str, Weight],
        plan: AdapterPlan,
        config: ModelConfig,
        settings: ModelSettings,
    ) -> None:
        self.input_layernorm = Norm(rows["input_layernorm"], config.rms_norm_eps)
        self.self_attn = LatentAttention(rows, plan, config, settings.latent_norm_eps)
        self.post_attention_layernorm = Norm(rows["post_attention_layernorm"], config.rms_norm_eps)
        if "mlp.gate.weight" in rows:
            self.mlp = MixtureOfExperts(rows, plan, config)
        else:
            self.mlp = SwiGlu(rows, "mlp", plan)

    def __call__(
        self, x_BTD: Array, positions_BT: Array, segment_ids_BT: Array
    ) -> tuple[Array, Array]:
        """The residual stream after the layer, and the experts' loads ([0] for a dense layer)."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), positions_BT, segment_ids_BT)
        return self._feed_forward(x_BTD, segment_ids_BT > 0)

    def decode(
        self, x_BTD: Array, positions_BT: Array, cache: LatentCache
    ) -> tuple[Array, LatentCache]:
        """The same for new tokens against a cache of this layer, which comes back with them in it."""
        attended, cache = self.self_attn.decode(self.input_layernorm(x_BTD), positions_BT, cache)
        all_count = jnp.ones(positions_BT.shape, bool)
        return self._feed_forward(x_BTD + attended, all_count)[0], cache

    def _feed_forward(self, x_BTD: Array, counted_BT: Array) -> tuple[Array, Array]:
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MixtureOfExperts):
            y_BTD, load_E = self.mlp(normed, counted_BT)
        else:
            y_BTD, load_E = self.mlp(normed), jnp.zeros((0,), jnp.int32)
        return x_BTD + y_BTD, load_E


class Transformer(nnx.Module):
    """A model of the Kimi-K2 family. Its stacks hold the weights of all their layers."""

    def __init__(self, config: ModelConfig, plan: AdapterPlan, settings: ModelSettings) -> None:
        table = weight_table(config)
        rows = {weight.path: weight for weight in table}
        self.config = config
        self.settings = settings
        self.embed_tokens = declare(rows["embed_tokens"])
        stacks = {
            stack: {weight.name: weight for weight in table if weight.stack == stack}
            for stack in ("dense_layers", "moe_layers")
        }
        self.dense_layers, self.moe_layers = (
            Layer(stacked, plan, config, settings) if stacked else None
            for stacked in stacks.values()
        )
        self.norm = Norm(rows["norm"], config.rms_norm_eps)
        self.lm_head = Linear(rows["lm_head"], plan)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every position, fp32 [B, T, V]: for looking; training never forms them all.

        Args:
            tokens: int32 ids below the vocabulary's size; others are refused.
            positions: int32; 0, 1, 2, … in every row if not given.
            segment_ids: int32; tokens see only their own segment. One segment a row if not given.
        """
        check_tokens(tokens, self.config)  # before int64 becomes int32, which would wrap
        tokens = jnp.asarray(tokens)
        graph, state = nnx.split(self)
        return _logits(graph, state, tokens, *_default_places(tokens, positions, segment_ids))

    def hidden(
        self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array
    ) -> tuple[Float[Array, "B T D"], Int[Array, "L E"]]:
        """Final normed hidden states, and each layer's assignments by expert (segment 0 is padding)."""
        x_BTD = self._embed(tokens_BT)

        def apply(layer: Layer, x: Array, _: None) -> tuple[Array, Array]:
            return layer(x, positions_BT, segment_ids_BT)

        loads = jnp.zeros((0, self.config.n_routed_experts), jnp.int32)
        for stack in (self.dense_layers, self.moe_layers):
            if stack is not None:
                x_BTD, loads = scan_stack(stack, apply, x_BTD, None, self.settings.recompute)
        return self.norm(x_BTD), loads

    def decode(
        self, tokens_BT: Array, positions_BT: Array, caches: tuple[LatentCache | None, ...]
    ) -> tuple[Float[Array, "B T D"], tuple[LatentCache | None, ...]]:
        """Final normed hidden states of new tokens, and the caches with them in it."""
        x_BTD = self._embed(tokens_BT)

        def apply(layer: Layer, x: Array, cache: LatentCache) -> tuple[Array, LatentCache]:
            return layer.decode(x, positions_BT, cache)

        updated: list[LatentCache | None] = []
        for stack, cache in zip((self.dense_layers, self.moe_layers), caches, strict=True):
            if stack is None:
                updated.append(None)
                continue
            x_BTD, new_cache = scan_stack(stack, apply, x_BTD, cache, "none")
            updated.append(new_cache)
        return self.norm(x_BTD), tuple(updated)

    def empty_caches(self, batch: int, length: int) -> tuple[LatentCache | None, ...]:
        """Zeroed caches of both stacks for `batch` rows of up to `length` positions."""
        config = self.config

        def cache(layers: int) -> LatentCache | None:
            if not layers:
                return None
            lead = (layers, batch, length)
            dtype = self.settings.dtype
            return LatentCache(
                jnp.zeros((*lead, config.kv_lora_rank), dtype),
                jnp.zeros((*lead, config.qk_rope_head_dim), dtype),
            )

        return cache(config.first_k_dense_replace), cache(config.num_moe_layers)

    def head_logits(self, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Logits of chosen hidden states, fp32."""
        return kernels.head_logits(hidden, self.lm_head.weight[...], self.lm_head.adapter)

    def _embed(self, tokens_BT: Array) -> Array:
        return self.embed_tokens[...][tokens_BT].astype(self.settings.dtype)


def scan_stack(
    stack: Layer,
    apply: Callable[[Layer, Array, Any], tuple[Array, Any]],
    x: Array,
    inputs: Any,
    recompute: Recompute,
) -> tuple[Array, Any]:
    """Applies a stack's layers in order: `apply(layer, x, inputs of the layer) -> x, output`.

    With recompute "layer" the backward pass keeps each layer's input and the router's choice, and
    computes the rest again.
    """
    graph, weights = nnx.split(stack)

    def body(carry: Array, slices: tuple[Any, Any]) -> tuple[Array, Any]:
        layer_weights, layer_inputs = slices
        return apply(nnx.merge(graph, layer_weights), carry, layer_inputs)

    if recompute == "layer":
        keep = jax.checkpoint_policies.save_only_these_names(ROUTING)
        body = jax.checkpoint(body, policy=keep, prevent_cse=False)
    return jax.lax.scan(body, x, (weights, inputs))


class ModelDef:
    """A model's structure: what its two trees of values hold, by path, and how to bind them."""

    def __init__(
        self,
        config: ModelConfig,
        plan: AdapterPlan | None = None,
        settings: ModelSettings | None = None,
    ) -> None:
        self.config = config
        self.plan = dict(plan or {})
        self.settings = settings or ModelSettings()
        model = Transformer(config, self.plan, self.settings)
        self._graph, base, adapters = nnx.split(model, Base, nnx.LoRAParam)
        self._base_paths, self._base_tree = _paths(base)
        self._adapter_paths, self._adapter_tree = _paths(adapters)
        self.base_shapes = dict(zip(self._base_paths, jax.tree.leaves(base), strict=True))
        self.adapter_shapes = dict(zip(self._adapter_paths, jax.tree.leaves(adapters), strict=True))

    def bind(self, base: Values, adapters: Values) -> Transformer:
        """The model with these values; inside a transformation, values may be tracers."""
        assert base.keys() == self.base_shapes.keys(), "a base tree of another model"
        assert adapters.keys() == self.adapter_shapes.keys(), "adapters of another plan"
        return nnx.merge(
            self._graph,
            jax.tree.unflatten(self._base_tree, [base[path] for path in self._base_paths]),
            jax.tree.unflatten(
                self._adapter_tree, [adapters[path] for path in self._adapter_paths]
            ),
        )


def check_tokens(tokens: Any, config: ModelConfig) -> None:
    """Refuses ids outside the vocabulary, which an embedding lookup would clamp in silence."""
    if isinstance(tokens, Tracer) or tokens.size == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise UserError(
            f"token id {bad} is outside the vocabulary; required: 0 to {config.vocab_size - 1}. "
            "Was the text tokenised with this checkpoint's tokenizer?"
        )


def _paths(state: nnx.State) -> tuple[list[str], Any]:
    leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    paths = [".".join(str(key.key) for key in path) for path, _ in leaves]
    assert jax.tree.structure(state).num_leaves == tree.num_leaves
    return paths, jax.tree.structure(state)


def _default_places(tokens: Array, positions: Any, segment_ids: Any) -> tuple[Array, Array]:
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    return jnp.asarray(positions), jnp.asarray(segment_ids)


@partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, tokens: Array, positions: Array, segment_ids: Array) -> Array:
    model: Transformer = nnx.merge(graph, state)
    return model.head_logits(model.hidden(tokens, positions, segment_ids)[0])
