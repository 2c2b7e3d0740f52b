"""The whole model: embedding, a stack of dense layers, a stack of mixture-of-experts layers, head.

`ModelDef` describes a model without holding a value; `bind` gives it its two trees of values, the
frozen base and the adapters, which stay apart everywhere else.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.kernels import api as kernels
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.attention import LatentCache
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.layer import Layer, ModelSettings, scan_stack
from kimi_jax.model.layers import Base, Linear, Norm, declare
from kimi_jax.model.layout import adapter_specs, base_arrays
from kimi_jax.model.moe import MixtureOfExperts
from kimi_jax.model.params import weight_table
from kimi_jax.parallel.ranks import REPLICATED
from kimi_jax.parallel.vocabulary import look_up

Values = Mapping[str, Any]  # arrays, or their shapes, by path


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
        self.lm_head = Linear(rows["lm_head"], plan, settings.ranks)

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
        specs = jax.tree.map(_spec_of, state) if self.settings.ranks.mesh else None
        places = (tokens, *_default_places(tokens, positions, segment_ids))
        if specs is not None:
            places = (self.settings.ranks.put(place, REPLICATED) for place in places)
        return _logits(graph, _Static(specs), state, *places)

    def hidden(
        self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array, whole: bool = False
    ) -> tuple[Float[Array, "B T D"], Int[Array, "L E"]]:
        """Final normed hidden states, and each layer's assignments by expert (segment 0 is padding).

        On several ranks it is called inside `Ranks.run`: each has rows of its own, or with `whole` all
        have the same. Assignments are those of the rows at hand.
        """
        x_BTD = self.embed(tokens_BT, whole)

        def apply(layer: Layer, x: Array, _: None, number: Array) -> tuple[Array, Array]:
            parts = 1 if whole else self.settings.half_batches
            if parts == 1 or not isinstance(layer.mlp, MixtureOfExperts):
                return layer(x, positions_BT, segment_ids_BT, number, whole)
            cut = [jnp.array_split(v, parts) for v in (x, positions_BT, segment_ids_BT)]
            done = [layer(x, pos, seg, number) for x, pos, seg in zip(*cut, strict=True)]
            outputs, loads = zip(*done, strict=True)
            return jnp.concatenate(outputs), jnp.stack(loads).sum(axis=0)

        loads = jnp.zeros((0, self.config.n_routed_experts), jnp.int32)
        for stack in (self.dense_layers, self.moe_layers):
            if stack is not None:
                x_BTD, loads = scan_stack(stack, apply, x_BTD, None, *self.settings.recomputed)
        return self.norm(x_BTD), loads

    def decode(
        self, tokens_BT: Array, positions_BT: Array, caches: tuple[LatentCache | None, ...]
    ) -> tuple[Float[Array, "B T D"], tuple[LatentCache | None, ...]]:
        """Final normed hidden states of new tokens, and the caches with them in it."""
        x_BTD = self.embed(tokens_BT, whole=True)

        def apply(
            layer: Layer, x: Array, cache: LatentCache, number: Array
        ) -> tuple[Array, LatentCache]:
            return layer.decode(x, positions_BT, cache, number)

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
        """Logits of chosen hidden states, fp32; all ranks have the same states."""
        logits = kernels.head_logits(hidden, self.lm_head.weight[...], self.lm_head.adapter)
        return self.settings.ranks.gather_last(logits)

    def embed(self, tokens_BT: Array, whole: bool) -> Array:
        """The residual stream [B, T, D] before the first layer; `whole` as in `hidden`."""
        ranks = self.settings.ranks.whole_rows if whole else self.settings.ranks
        table = self.embed_tokens[...]
        rows = look_up(ranks, table, tokens_BT.reshape(-1), self.settings.dtype)
        return rows.reshape(*tokens_BT.shape, -1)


class ModelDef:
    """A model's structure: what its two trees of values hold, by path, and how to bind them.

    `base_shapes` and `adapter_shapes` are those of whole arrays, `base_specs` and `adapter_specs` how
    they lie on the mesh of `settings.ranks`. Inside `Ranks.run` the values bound are a rank's parts.
    """

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
        places = base_arrays(weight_table(config), self.settings.ranks)
        self.base_specs = {path: places[path].spec for path in self._base_paths}
        self.adapter_specs = adapter_specs(self.plan)

    @cached_property
    def with_whole_rest(self) -> "ModelDef":
        """The same model, whose ranks hold all weights whole that are not experts' or the vocabulary's."""
        ranks = replace(self.settings.ranks, rest="replicated")
        return ModelDef(self.config, self.plan, self.settings._replace(ranks=ranks))

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


class _Static:
    """A tree of specs as a static argument: compared leaf by leaf."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self._key = (tuple(jax.tree.leaves(tree)), jax.tree.structure(tree))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


def _spec_of(array: Any) -> PartitionSpec:
    sharding = getattr(array, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


@partial(jax.jit, static_argnums=(0, 1))
def _logits(
    graph: Any, specs: _Static, state: Any, tokens: Array, positions: Array, segment_ids: Array
) -> Array:
    def logits(state: Any, tokens: Array, positions: Array, segment_ids: Array) -> Array:
        model: Transformer = nnx.merge(graph, state)
        return model.head_logits(model.hidden(tokens, positions, segment_ids, whole=True)[0])

    ranks = nnx.merge(graph, state).settings.ranks
    everywhere = (REPLICATED,) * 3
    run = ranks.run(logits, (specs.tree, *everywhere), REPLICATED)
    return run(state, tokens, positions, segment_ids)
