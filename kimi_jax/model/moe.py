"""Feed-forward layers: the SwiGLU of dense layers, and the mixture of experts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.kernels import api as kernels
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.layers import ExpertLinear, Linear, declare
from kimi_jax.model.layout import in_parts
from kimi_jax.model.params import Weight
from kimi_jax.parallel.experts import routed
from kimi_jax.parallel.ranks import Ranks

# Saved under every recompute policy: recomputed in another fusion, a near-tie could choose another
# expert in the backward pass than in the forward pass.
ROUTING = "chosen_experts"


class SwiGlu(nnx.Module):
    """down(silu(gate(x)) · up(x)): a dense layer's feed-forward, or the shared experts' as one."""

    def __init__(
        self, rows: dict[str, Weight], prefix: str, plan: AdapterPlan, ranks: Ranks
    ) -> None:
        self.gate_proj = Linear(rows[f"{prefix}.gate_proj"], plan, ranks)
        self.up_proj = Linear(rows[f"{prefix}.up_proj"], plan, ranks)
        self.down_proj = Linear(rows[f"{prefix}.down_proj"], plan, ranks)

    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """Activation dtype in and out."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Routing(NamedTuple):
    """The router's choice: experts [tokens, K] int32 and their fp32 weights [tokens, K]."""

    experts: Int[Array, "tokens K"]
    weights: Float[Array, "tokens K"]


class Router(nnx.Module):
    """Sigmoid scores; a correction bias takes part in the choice and not in the weights ("noaux_tc")."""

    def __init__(self, rows: dict[str, Weight], config: ModelConfig, ranks: Ranks) -> None:
        self.weight = declare(rows["mlp.gate.weight"])
        self.e_score_correction_bias = declare(rows["mlp.gate.e_score_correction_bias"])
        self.config = config
        self.ranks = ranks
        self.in_parts = in_parts(rows["mlp.gate.weight"], ranks)

    def __call__(self, x_TD: Float[Array, "tokens D"]) -> Routing:
        """All of it in fp32, as in HF's DeepseekV3TopkRouter; gradients flow through the weights."""
        weight = self.weight[...]
        weight_ED = self.ranks.gather(weight) if self.in_parts else weight
        logits = jnp.einsum(
            "td,ed->te",
            x_TD.astype(jnp.float32),
            weight_ED.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        scores = jax.nn.sigmoid(logits)
        choice = jax.lax.stop_gradient(scores + self.e_score_correction_bias[...])
        _, experts = jax.lax.top_k(choice, self.config.num_experts_per_tok)
        experts = checkpoint_name(experts, ROUTING)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.config.norm_topk_prob and self.config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(experts, weights * self.config.routed_scaling_factor)


class Experts(nnx.Module):
    """The three projections of the routed experts of a rank, in all layers of the stack."""

    def __init__(self, rows: dict[str, Weight], plan: AdapterPlan) -> None:
        self.gate_proj = ExpertLinear(rows["mlp.experts.gate_proj"], plan)
        self.up_proj = ExpertLinear(rows["mlp.experts.up_proj"], plan)
        self.down_proj = ExpertLinear(rows["mlp.experts.down_proj"], plan)

    def __call__(self, x_AD: Array, group_sizes_E: Array, weights_A: Array, layer: Array) -> Array:
        """Σ-ready outputs of assignments sorted by expert: weight · down(silu(gate) · up).

        The routing weight multiplies the hidden activation before `down_proj`, which gives the same
        product and keeps the weight's gradient from needing the expert's output.
        """

        def project(linear: ExpertLinear, x: Array) -> Array:
            return kernels.grouped_matmul(
                x, linear.grouped_weight, group_sizes_E, linear.adapter, layer=layer
            )

        hidden_AM = jax.nn.silu(project(self.gate_proj, x_AD)) * project(self.up_proj, x_AD)
        weighted = (hidden_AM.astype(jnp.float32) * weights_A[:, None]).astype(x_AD.dtype)
        return project(self.down_proj, weighted)


class MixtureOfExperts(nnx.Module):
    """Routed experts, weighted and summed, plus the shared experts, which every token passes."""

    def __init__(
        self, rows: dict[str, Weight], plan: AdapterPlan, config: ModelConfig, ranks: Ranks
    ) -> None:
        self.gate = Router(rows, config, ranks)
        self.experts = Experts(rows, plan)
        self.shared_experts = SwiGlu(rows, "mlp.shared_experts", plan, ranks)
        self.config = config
        self.ranks = ranks

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        counted_BT: Bool[Array, "B T"],
        layer: Int[Array, ""],
        whole: bool,
    ) -> tuple[Float[Array, "B T D"], Int[Array, " E"]]:
        """The layer's output, and how many assignments of the counted tokens each expert received.

        Args:
            x_BTD: this rank's rows, or with `whole` the same rows on all ranks.
            counted_BT: which tokens count.
            layer: the layer's number in its stack.
            whole: whether all ranks have the same rows.
        """
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        experts = self.config.n_routed_experts
        routing = self.gate(x_TD)
        graph, trained, frozen = nnx.split(self.experts, nnx.LoRAParam, ...)

        def compute(
            trained: Any, frozen: Any, x_AD: Array, weights_A: Array, sizes: Array
        ) -> Array:
            state, layer = frozen
            module: Experts = nnx.merge(graph, trained, state)
            return module(x_AD, sizes, weights_A, layer)

        y_TD = routed(
            self.ranks.whole_rows if whole else self.ranks,
            compute,
            trained,
            (frozen, layer),
            x_TD,
            routing.experts,
            routing.weights,
            experts,
        )
        # Tokens that do not count, padding, go to an expert beyond the last, which is cut off.
        seen = jnp.where(counted_BT.reshape(-1, 1), routing.experts, experts)
        load_E = jnp.bincount(seen.reshape(-1), length=experts + 1)[:experts]
        return y_TD.reshape(x_BTD.shape) + self.shared_experts(x_BTD), load_E
