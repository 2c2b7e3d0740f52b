"""One layer, a stack of them, and what the program decides about both."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from kimi_jax.config import Keep, Recompute
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.attention import LatentAttention, LatentCache
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.kept import STREAM, policy
from kimi_jax.model.layers import Norm, Stacked
from kimi_jax.model.moe import MixtureOfExperts, SwiGlu
from kimi_jax.model.params import Weight
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks


class ModelSettings(NamedTuple):
    """What the program, not the checkpoint, decides about the arithmetic and where it is done.

    half_batches: into so many parts a mixture-of-experts layer cuts a rank's rows; with 2, one part's
    rows can travel while the other's are computed.
    """

    dtype: Any = jnp.bfloat16
    latent_norm_eps: float = 1e-6
    recompute: Recompute = "layer"
    keep: tuple[Keep, ...] = ()
    ranks: Ranks = ONE_DEVICE
    half_batches: int = 1
    offload: tuple[Keep, ...] = ()

    @property
    def recomputed(self) -> tuple[Recompute, tuple[Keep, ...], tuple[Keep, ...]]:
        """What `scan_stack` is told of the backward pass."""
        return self.recompute, self.keep, self.offload


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
        ranks = settings.ranks
        self.self_attn = LatentAttention(rows, plan, config, settings.latent_norm_eps, ranks)
        self.post_attention_layernorm = Norm(rows["post_attention_layernorm"], config.rms_norm_eps)
        if "mlp.gate.weight" in rows:
            self.mlp = MixtureOfExperts(rows, plan, config, ranks)
        else:
            self.mlp = SwiGlu(rows, "mlp", plan, ranks)

    def __call__(
        self,
        x_BTD: Array,
        positions_BT: Array,
        segment_ids_BT: Array,
        number: Int[Array, ""],
        whole: bool = False,
    ) -> tuple[Array, Array]:
        """The residual stream after the layer, and the experts' loads ([0] for a dense layer).

        Args:
            x_BTD: the residual stream before it: this rank's rows, or with `whole` the same on all ranks.
            positions_BT: int32.
            segment_ids_BT: int32; 0 is padding.
            number: of the layer in its stack.
            whole: whether all ranks have the same rows.
        """
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), positions_BT, segment_ids_BT)
        x_BTD = checkpoint_name(x_BTD, STREAM)
        return self._feed_forward(x_BTD, segment_ids_BT > 0, number, whole)

    def decode(
        self, x_BTD: Array, positions_BT: Array, cache: LatentCache, number: Int[Array, ""]
    ) -> tuple[Array, LatentCache]:
        """The same for new tokens against a cache of this layer, which comes back with them in it.

        All ranks have the same rows.
        """
        attended, cache = self.self_attn.decode(self.input_layernorm(x_BTD), positions_BT, cache)
        all_count = jnp.ones(positions_BT.shape, bool)
        return self._feed_forward(x_BTD + attended, all_count, number, whole=True)[0], cache

    def _feed_forward(
        self, x_BTD: Array, counted_BT: Array, number: Array, whole: bool
    ) -> tuple[Array, Array]:
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MixtureOfExperts):
            y_BTD, load_E = self.mlp(normed, counted_BT, number, whole)
        else:
            y_BTD, load_E = self.mlp(normed), jnp.zeros((0,), jnp.int32)
        return x_BTD + y_BTD, load_E


def scan_stack(
    stack: Layer,
    apply: Callable[[Layer, Array, Any, Array], tuple[Array, Any]],
    x: Array,
    inputs: Any,
    recompute: Recompute,
    keep: Sequence[Keep] = (),
    offload: Sequence[Keep] = (),
) -> tuple[Array, Any]:
    """Applies a stack's layers in order: `apply(layer, x, inputs of it, its number) -> x, output`.

    Experts' weights are not cut into layers: every kernel would be given a copy of its layer's. With
    recompute "layer" the backward pass keeps each layer's input and what `kept` says, and computes the
    rest again.
    """
    graph, stacked, weights = nnx.split(stack, Stacked, ...)
    numbers = jnp.arange(jax.tree.leaves(weights)[0].shape[0], dtype=jnp.int32)

    def body(carry: Array, slices: tuple[Any, Any, Array]) -> tuple[Array, Any]:
        layer_weights, layer_inputs, number = slices
        return apply(nnx.merge(graph, stacked, layer_weights), carry, layer_inputs, number)

    if recompute == "layer":
        body = jax.checkpoint(body, policy=policy(keep, offload), prevent_cse=False)
    return jax.lax.scan(body, x, (weights, inputs, numbers))
