"""Results of a layer that its backward pass may keep instead of computing them again, by name.

Under `train.recompute: layer` the backward pass keeps a layer's input and, of what it computes from
it, what bears one of these names: on the device, or in the host's memory (`train.offload`), from where
XLA copies it back beside the computation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from kimi_jax.config import Keep
from kimi_jax.kernels.linear.joined import LOW_RANK
from kimi_jax.kernels.mla_attention.residuals import LOGSUMEXP_NAME, OUTPUT_NAME
from kimi_jax.parallel.experts import ORDER

# Always kept. Recomputed in another fusion, a near-tie of the router could choose another expert than
# in the forward pass. The chosen experts' logits are small beside the product that makes all, the order
# of assignments beside its sort, an adapter's rank-wide product beside the operand it is made from, one
# number a token beside the row that a norm reads for it.
ROUTING = "chosen_experts"

STREAM = "stream"
STATISTICS = "norm_statistics"
LATENT = "latent"
QUERIES, KEYS_VALUES = "queries", "keys_values"
FEED_FORWARD = "feed_forward"
EXPERT_GATE, EXPERT_UP = "expert_gate", "expert_up"

NAMES: dict[Keep, tuple[str, ...]] = {
    "stream": (STREAM,),
    "latents": (LATENT,),
    "queries": (QUERIES,),
    "keys_values": (KEYS_VALUES,),
    "attention": (OUTPUT_NAME, LOGSUMEXP_NAME),
    "feed_forward": (FEED_FORWARD,),
    "expert_gate": (EXPERT_GATE,),
    "expert_up": (EXPERT_UP,),
}


def policy(keep: Sequence[Keep], offload: Sequence[Keep] = ()) -> Callable[..., Any]:
    """What `jax.checkpoint` keeps on the device, and what in the host's memory."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ROUTING, ORDER, LOW_RANK, STATISTICS, *_names(keep)],
        names_which_can_be_offloaded=_names(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


def _names(kept: Sequence[Keep]) -> list[str]:
    return [name for each in kept for name in NAMES[each]]
