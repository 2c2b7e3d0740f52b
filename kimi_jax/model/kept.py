"""Results of a layer that its backward pass may keep instead of computing them again, by name.

Under `train.recompute: layer` the backward pass keeps a layer's input and, of what it computes from
it, what bears one of these names.
"""

from collections.abc import Sequence

from kimi_jax.config import Keep
from kimi_jax.kernels.linear.joined import LOW_RANK
from kimi_jax.kernels.mla_attention.residuals import LOGSUMEXP_NAME, OUTPUT_NAME
from kimi_jax.parallel.experts import ORDER

# Always kept. Recomputed in another fusion, a near-tie of the router could choose another expert than
# in the forward pass. The chosen experts' logits are small beside the product that makes all, the order
# of assignments beside its sort, an adapter's rank-wide product beside the operand it is made from.
ROUTING = "chosen_experts"

STREAM = "stream"
LATENT = "latent"
FEED_FORWARD = "feed_forward"
EXPERT_GATE, EXPERT_UP = "expert_gate", "expert_up"

NAMES: dict[Keep, tuple[str, ...]] = {
    "stream": (STREAM,),
    "latents": (LATENT,),
    "attention": (OUTPUT_NAME, LOGSUMEXP_NAME),
    "feed_forward": (FEED_FORWARD,),
    "expert_gate": (EXPERT_GATE,),
    "expert_up": (EXPERT_UP,),
}


def names_of(keep: Sequence[Keep]) -> tuple[str, ...]:
    """All names that a checkpoint policy saves."""
    return (ROUTING, ORDER, LOW_RANK, *(name for kept in keep for name in NAMES[kept]))
