"""Feed-forward layers: the SwiGLU of dense layers, and the mixture of experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.kernels import api as kernels
from kimi_jax.kernels.token_movement import combine, dispatch, sort_by_expert
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.layers import ExpertLinear, Linear, declare
from kimi_jax.model.params import Weight

# Saved under every recompute policy: recomputed in another fusion, a near-tie could choose another
# expert in the backward pass than in the forward pass.
ROUTING = "chosen_experts"


class SwiGlu(nnx.Module):
    """down(silu(gate(x)) · up(x)): a dense layer's feed-forward, or the shared experts' as one."""

    def __init__(self, rows: dict[str, Weight], prefix: str, plan: AdapterPlan) -> None:
        self.gate_proj = Linear(rows[f"{prefix}.gate_proj"], plan)
        self.up_proj = Linear(rows[f"{prefix}.up_proj"], plan)
        self.down_proj = Linear(rows[f"{prefix}.down_proj"], plan)

    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """Activation dtype in and out."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Routing(NamedTuple):
    """The router's choice: experts [tokens, K] int32 and their fp32 weights [tokens, K]."""

    experts: Int[Array, "tokens K"]
    weights: Float[Array, "tokens K"]


class Router(nnx.Module):
    """Sigmoid scores; a correction bias takes part in the choice and not in the weights ("noaux_tc")."""

    def __init__(self, rows: dict[str, Weight], config: ModelConfig) -> None:
        self.weight = declare(rows["mlp.gate.weight"])
        self.e_score_correction_bias = declare(rows["mlp.gate.e_score_correction_bias"])
        self.config = config

    def __call__(self, x_TD: Float[Array, "tokens D"]) -> Routing:
        """All of it in fp32, as in HF's DeepseekV3TopkRouter; gradients flow through the weights."""
        logits = jnp.einsum(
            "td,ed->te",
            x_TD.astype(jnp.float32),
            self.weight[...].astype(jnp.float32),
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
    """The three projections of all routed experts of a layer."""

    def __init__(self, rows: dict[str, Weight], plan: AdapterPlan) -> None:
        self.gate_proj = ExpertLinear(rows["mlp.experts.gate_proj"], plan)
        self.up_proj = ExpertLinear(rows["mlp.experts.up_proj"], plan)
        self.down_proj = ExpertLinear(rows["mlp.experts.down_proj"], plan)

    def __call__(self, x_AD: Array, group_sizes_E: Array, weights_A: Array) -> Array:
        """Σ-ready outputs of assignments sorted by expert: weight · down(silu(gate) · up).

        The routing weight multiplies the hidden activation before `down_proj`, which gives the same
        product and keeps the weight's gradient from needing the expert's output.
        """

        def project(layer: ExpertLinear, x: Array) -> Array:
            return kernels.grouped_matmul(x, layer.grouped_weight, group_sizes_E, layer.adapter)

        hidden_AM = jax.nn.silu(project(self.gate_proj, x_AD)) * project(self.up_proj, x_AD)
        weighted = (hidden_AM.astype(jnp.float32) * weights_A[:, None]).astype(x_AD.dtype)
        return project(self.down_proj, weighted)


class MixtureOfExperts(nnx.Module):
    """Routed experts, weighted and summed, plus the shared experts, which every token passes."""

    def __init__(self, rows: dict[str, Weight], plan: AdapterPlan, config: ModelConfig) -> None:
        self.gate = Router(rows, config)
        self.experts = Experts(rows, plan)
        self.shared_experts = SwiGlu(rows, "mlp.shared_experts", plan)
        self.config = config

    def __call__(
        self, x_BTD: Float[Array, "B T D"], counted_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Int[Array, " E"]]:
        """The layer's output, and how many assignments of the counted tokens each expert received."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        k, experts = self.config.num_experts_per_tok, self.config.n_routed_experts
        routing = self.gate(x_TD)
        order = sort_by_expert(routing.experts, experts)
        weights_A = dispatch(routing.weights.reshape(-1, 1), order, 1)[:, 0]
        y_AD = self.experts(dispatch(x_TD, order, k), order.group_sizes, weights_A)
        routed = combine(y_AD, order, k).reshape(x_BTD.shape)
        # Tokens that do not count, padding, go to an expert beyond the last, which is cut off.
        seen = jnp.where(counted_BT.reshape(-1, 1), routing.experts, experts)
        load_E = jnp.bincount(seen.reshape(-1), length=experts + 1)[:experts]
        return routed + self.shared_experts(x_BTD), load_E
