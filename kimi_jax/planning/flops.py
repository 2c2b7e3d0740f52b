"""FLOPs of a token, by three ways to count them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kimi_jax.config import Keep, Recompute
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight


@dataclass(frozen=True)
class TokenFlops:
    """FLOP of one token.

    frozen: 4N, forward and input-gradient through the N active parameters but the embedding, the
    convention of MFU here. recomputed: with the products that the backward pass makes again. attention:
    causal scores and their use, forward, which neither counts.
    """

    frozen: int
    recomputed: int
    attention: int


def active_parameters(table: Sequence[Weight], config: ModelConfig) -> int:
    """Parameters that one token is multiplied by; the embedding is looked up, not multiplied."""
    total = 0
    for weight in table:
        if weight.role == "routed":
            total += weight.parameters * config.num_experts_per_tok // config.n_routed_experts
        elif weight.is_linear or weight.name == "mlp.gate.weight":
            total += weight.parameters
    return total


def parameters_made_again(
    table: Sequence[Weight], config: ModelConfig, recompute: Recompute, keep: Collection[Keep]
) -> int:
    """Active parameters whose forward product the backward pass repeats.

    The last product of a feed-forward is not: it is only added to the stream. Nor is the head's.
    """
    if recompute == "none":
        return 0

    def spared(weight: Weight) -> bool:
        projection = weight.name.rsplit(".", 1)[-1]
        by_role: Keep = "feed_forward"
        if weight.role == "routed":
            by_role = "expert_gate" if projection == "gate_proj" else "expert_up"
        kept_by: dict[str, Keep] = {
            "o_proj": "stream",
            "q_a_proj": "latents",
            "q_proj": "queries",
            "q_b_proj": "queries",
            "kv_b_proj": "keys_values",
            "kv_a_proj_with_mqa": "latents",
            "gate_proj": by_role,
            "up_proj": by_role,
        }
        return weight.role == "head" or projection == "down_proj" or kept_by.get(projection) in keep

    return active_parameters([weight for weight in table if not spared(weight)], config)


def token_flops(
    table: Sequence[Weight],
    config: ModelConfig,
    recompute: Recompute,
    length: int,
    keep: Collection[Keep] = (),
) -> TokenFlops:
    """Of a token in a full sequence of `length`."""
    active = active_parameters(table, config)
    again = 2 * parameters_made_again(table, config, recompute, keep)
    heads = config.num_hidden_layers * config.num_attention_heads
    # Two products a pair of positions, of which a causal mask leaves half.
    attention = heads * (config.qk_head_dim + config.v_head_dim) * length
    return TokenFlops(4 * active, 4 * active + again, attention)
