"""Feed-forward layers: the SwiGLU of dense layers, and the mixture of experts."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kimi_jax.kernels import api as kernels
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.kept import EXPERT_GATE, EXPERT_UP, FEED_FORWARD, LOW_RANK, ROUTING
from kimi_jax.model.layers import ExpertLinear, Linear, declare, together
from kimi_jax.model.layout import in_parts
from kimi_jax.model.params import Weight
from kimi_jax.parallel.experts import routed
from kimi_jax.parallel.ranks import Ranks


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
        gate, up = together(x, self.gate_proj, self.up_proj)
        gate, up = checkpoint_name(gate, FEED_FORWARD), checkpoint_name(up, FEED_FORWARD)
        return self.down_proj(jax.nn.silu(gate) * up)


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
        weight_ED = self.ranks.gather_weight(weight) if self.in_parts else weight
        logits = _logits(x_TD, weight_ED)
        choice = jax.lax.stop_gradient(jax.nn.sigmoid(logits) + self.e_score_correction_bias[...])
        _, experts = jax.lax.top_k(choice, self.config.num_experts_per_tok)
        experts = checkpoint_name(experts, ROUTING)
        # Of the logits, the derivative needs the chosen ones only, which are few enough to keep.
        chosen = checkpoint_name(jnp.take_along_axis(logits, experts, axis=-1), ROUTING)
        weights = jax.nn.sigmoid(chosen)
        if self.config.norm_topk_prob and self.config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(experts, weights * self.config.routed_scaling_factor)


def _logits(x_TD: Array, weight_ED: Array) -> Array:
    """fp32 logits [tokens, E].

    Products of bf16 values are exact in fp32: where both are bf16, the fast bf16 product with fp32
    sums is the fp32 product.
    """
    if x_TD.dtype == weight_ED.dtype == jnp.bfloat16:
        return cast(Array, _exact_logits(x_TD, weight_ED))
    x_TD, weight_ED = x_TD.astype(jnp.float32), weight_ED.astype(jnp.float32)
    return jnp.einsum("td,ed->te", x_TD, weight_ED, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _exact_logits(x_TD: Array, weight_ED: Array) -> Array:
    return jnp.einsum("td,ed->te", x_TD, weight_ED, preferred_element_type=jnp.float32)


def _exact_logits_forward(x_TD: Array, weight_ED: Array) -> tuple[Array, tuple[Array, Array]]:
    return cast(Array, _exact_logits(x_TD, weight_ED)), (x_TD, weight_ED)


def _exact_logits_backward(saved: tuple[Array, Array], d_logits_TE: Array) -> tuple[Array, Array]:
    """The cotangent is rounded to bf16, as that of every other linear layer is."""
    x_TD, weight_ED = saved
    d_logits_TE = d_logits_TE.astype(x_TD.dtype)
    return (
        jnp.einsum("te,ed->td", d_logits_TE, weight_ED),
        jnp.einsum("te,td->ed", d_logits_TE, x_TD),
    )


_exact_logits.defvjp(_exact_logits_forward, _exact_logits_backward)


class Hidden(NamedTuple):
    """What the routed experts' gate and up projections put out, [A, M] each.

    low_in, low_out: what adapters make of the rows of gate and up, and of down, where a kernel makes it.
    """

    gate: Float[Array, "A M"]
    up: Float[Array, "A M"]
    low_in: Float[Array, "A r_in"] | None
    low_out: Float[Array, "A r_out"] | None


class Experts(nnx.Module):
    """The three projections of the routed experts of a rank, in all layers of the stack."""

    def __init__(self, rows: dict[str, Weight], plan: AdapterPlan) -> None:
        self.gate_proj = ExpertLinear(rows["mlp.experts.gate_proj"], plan)
        self.up_proj = ExpertLinear(rows["mlp.experts.up_proj"], plan)
        self.down_proj = ExpertLinear(rows["mlp.experts.down_proj"], plan)

    def __call__(
        self,
        x_AD: Array,
        group_sizes_E: Array,
        weights_A: Array,
        layer: Array,
        known: Hidden | None = None,
    ) -> tuple[Array, Hidden]:
        """Σ-ready outputs of assignments sorted by expert, weight · down(silu(gate) · up); gate and up.

        The routing weight multiplies the hidden activation before `down_proj`, which gives the same
        product and keeps the weight's gradient from needing the expert's output.

        Args:
            x_AD: rows sorted by expert.
            group_sizes_E: rows of each expert.
            weights_A: fp32 routing weights of the rows.
            layer: the layer's number in its stack.
            known: what an earlier call has made of the same rows.
        """

        def low_rank(x: Array, *projections: ExpertLinear) -> Array | None:
            weights = tuple(each.grouped_weight for each in projections)
            adapters = tuple(each.adapter for each in projections)
            low = kernels.grouped_low_rank(x, weights, group_sizes_E, adapters)
            return None if low is None else checkpoint_name(low, LOW_RANK)

        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        low_in = known.low_in if known else low_rank(x_AD, gate, up)
        gate_AM, up_AM = kernels.grouped_matmul_pair(
            x_AD,
            (gate.grouped_weight, up.grouped_weight),
            group_sizes_E,
            (gate.adapter, up.adapter),
            layer=layer,
            known=known and (known.gate, known.up),
            low=low_in,
        )
        gate_AM = checkpoint_name(gate_AM, EXPERT_GATE)
        up_AM = checkpoint_name(up_AM, EXPERT_UP)
        # Kernels leave rows behind the groups unwritten, and take such rows to be finite: what stands
        # there is cut off, here and, by this very operation, from the cotangents.
        real_A = jnp.arange(x_AD.shape[0])[:, None] < group_sizes_E.sum()
        # Zeros that know their layer: a constant would be made before the scan, as an array, and read.
        zero_A = (0 * jax.lax.stop_gradient(weights_A)).astype(x_AD.dtype)[:, None]
        hidden_AM = jax.nn.silu(jnp.where(real_A, gate_AM, zero_A))
        hidden_AM *= jnp.where(real_A, up_AM, zero_A)
        weighted = (hidden_AM.astype(jnp.float32) * weights_A[:, None]).astype(x_AD.dtype)
        low_out = known.low_out if known else low_rank(weighted, down)
        y_AD = kernels.grouped_matmul(
            weighted, down.grouped_weight, group_sizes_E, down.adapter, layer=layer, low=low_out
        )
        return y_AD, Hidden(gate_AM, up_AM, low_in, low_out)


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
            trained: Any, frozen: Any, x_AD: Array, weights_A: Array, sizes: Array, known: Any
        ) -> tuple[Array, Hidden]:
            state, layer = frozen
            module: Experts = nnx.merge(graph, trained, state)
            return module(x_AD, sizes, weights_A, layer, known)

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
