"""FLOPs of a token, by three ways to count them."""

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_jax.config import Recompute
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight


@dataclass(frozen=True)
class TokenFlops:
    """FLOP of one token.

    frozen: 4N, forward and input-gradient through the N active parameters but the embedding, the
    convention of MFU here. recomputed: with the forward pass of the layers made twice. attention:
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


def token_flops(
    table: Sequence[Weight], config: ModelConfig, recompute: Recompute, length: int
) -> TokenFlops:
    """Of a token in a full sequence of `length`."""
    active = active_parameters(table, config)
    head = sum(weight.parameters for weight in table if weight.role == "head")
    again = 2 * (active - head) if recompute == "layer" else 0
    heads = config.num_hidden_layers * config.num_attention_heads
    # Two products a pair of positions, of which a causal mask leaves half.
    attention = heads * (config.qk_head_dim + config.v_head_dim) * length
    return TokenFlops(4 * active, 4 * active + again, attention)
