"""What a rank's experts received, against the mean rank's part."""

from dataclasses import dataclass

import numpy as np

from tools.step_bench.rank import Rank


@dataclass(frozen=True)
class Loads:
    """Assignments of one micro-batch to one rank's experts, by layer, padding's left out.

    received: from all ranks' rows [layers]. mean: what the mean rank receives. passes: over the expert
    buffer [layers]. busiest, idlest: of the rank's experts, of the mean expert's, worst layer.
    """

    received: np.ndarray
    mean: float
    passes: np.ndarray
    busiest: float
    idlest: float

    @property
    def ratio(self) -> float:
        """All layers' assignments to those of the mean rank: below 1 flatters the step."""
        return float(self.received.mean() / self.mean) if len(self.received) else 1.0

    def to_json(self) -> dict[str, object]:
        """As what `json.dumps` takes."""
        return {
            "received_by_layer": [int(x) for x in self.received],
            "mean_rank_receives": self.mean,
            "received_to_mean": self.ratio,
            "received_to_mean_by_layer": [float(x / self.mean) for x in self.received],
            "passes_by_layer": [int(x) for x in self.passes],
            "busiest_expert_to_mean": self.busiest,
            "idlest_expert_to_mean": self.idlest,
        }


def loads(rank: Rank, expert_load: np.ndarray, real_tokens: int, number: int = 0) -> Loads:
    """Reads a step's metrics.

    Args:
        rank: alone, it owns the first experts, and what it would gather are copies of its own rows.
        expert_load: [layers, experts], assignments of the rows of the ranks at hand in one step.
        real_tokens: of those rows.
        number: of the rank whose experts are meant.
    """
    model, ranks = rank.model, rank.ranks
    steps = rank.config.train.accumulate
    here = model.n_routed_experts // ranks.expert
    copies = ranks.expert / rank.here  # of replicas, the mean
    mine = copies * np.asarray(expert_load)[:, number * here : (number + 1) * here] / steps
    received = mine.sum(axis=1)
    mean = copies * real_tokens / steps * model.num_experts_per_tok / ranks.expert
    parts = rank.config.mesh.half_batches
    gathered = rank.tokens * ranks.expert * model.num_experts_per_tok // parts
    passes = np.maximum(1, np.ceil(received / parts / ranks.buffer_rows(gathered)))
    by_expert = mine / (mean / here)
    return Loads(
        received,
        mean,
        passes,
        float(by_expert.max(initial=0.0)),
        float(by_expert.min(initial=np.inf)) if by_expert.size else 0.0,
    )
