"""The training loss, as a sum and its denominator.

Sums over tokens add up, means do not: kept apart until the optimizer's step, they make the loss the
same whether rows are packed or padded, together or in micro-batches, on one device or on many.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.model.transformer import Transformer
from kimi_jax.parallel.vocabulary import cross_entropy

BATCH_FIELDS = ("tokens", "loss_weights", "positions", "segment_ids")


class LossTerms(NamedTuple):
    """Σ weight · -log p (fp32, nats), Σ weight, and assignments by layer and expert [L, E]."""

    loss_sum: Float[Array, ""]
    weight_sum: Float[Array, ""]
    expert_load: Int[Array, "L E"]


def next_token_weights(
    loss_weights_BT: Float[Array, "B T"], segment_ids_BT: Int[Array, "B T"]
) -> Float[Array, "B T-1"]:
    """Weights of predicting tokens 1, 2, … of each row, [B, T-1].

    `loss_weights[b, t]` is the weight of predicting token t from those before it in its segment; the
    first token of a segment has none before it and counts for nothing, whatever its weight.
    """
    follows = segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]
    return jnp.where(follows, loss_weights_BT[:, 1:].astype(jnp.float32), 0.0)


def loss_terms(model: Transformer, batch: Mapping[str, Array], chunk: int) -> LossTerms:
    """The loss of one micro-batch, or of this rank's rows of it; `batch` holds `BATCH_FIELDS`, each [B, T].

    At most `chunk` of a rank's tokens' logits exist at a time.
    """
    hidden_BTD, loads = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
    weights = next_token_weights(batch["loss_weights"], batch["segment_ids"])
    loss_sum = cross_entropy(
        model.settings.ranks,
        hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1]),
        model.lm_head.weight[...],
        batch["tokens"][:, 1:].reshape(-1),
        weights.reshape(-1),
        model.lm_head.adapter,
        chunk,
    )
    return LossTerms(loss_sum, weights.sum(), loads)


def mean_loss(loss_sum: Array | float, weight_sum: Array | float) -> dict[str, float]:
    """Both terms as numbers, and their quotient `loss`, NaN if nothing has a weight."""
    total, weight = float(loss_sum), float(weight_sum)
    return {
        "loss_sum": total,
        "weight_sum": weight,
        "loss": total / weight if weight else float("nan"),
    }
