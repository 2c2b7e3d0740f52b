"""What is measured: rows of one length or packed documents, natural or skewed routing.

Cases of one row length differ in values only, so that they share one compiled program.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from kimi_jax.data.chat import Example
from kimi_jax.data.packing import packed_batches
from kimi_jax.model.config import ModelConfig
from tools.step_bench.rank import Rank

ROUTINGS, ROWS = ("natural", "skewed"), ("constant", "packed")
BIAS = "moe_layers.mlp.gate.e_score_correction_bias"
# Documents: log-normal lengths. With this width the longest hundredth holds about a tenth of the tokens.
MEDIAN, SIGMA, SHORTEST = 600, 1.0, 16
DOCUMENTS = 4096  # for each rank; they are seen again when they are used up
SETTLED, SEEN = (
    16,
    48,
)  # batches until the packer's open rows are filled, and those chosen from then
HOT_SHARE, HOT_TIMES = 16, 8  # one expert of so many is chosen so many times as often as the mean
COLD_SHARE, COLD_TIMES = 4, 0.02

HOW = {
    "natural": "random router weights as they come, the correction bias 0",
    "skewed": (
        f"through e_score_correction_bias, each layer and rank alike in another order: 1 expert of "
        f"{HOT_SHARE} is raised to {HOT_TIMES} × the mean's assignments, 1 of {COLD_SHARE} lowered to "
        f"{COLD_TIMES} × (for scores of unit normal logits before renormalising; see the loads measured)"
    ),
    "constant": "every row one document of its full length",
    "packed": (
        f"documents of log-normal length, median {MEDIAN}, sigma {SIGMA}, cut at the row's length, packed "
        f"by kimi_jax.data; of {SEEN} batches the one whose padding is nearest their mean; padding is not "
        "counted"
    ),
}


@dataclass(frozen=True)
class Case:
    """A batch [micro-batches, B, T] with its name; host arrays, B the rows of all `ranks`."""

    rows: str
    batch: Mapping[str, np.ndarray]
    ranks: int = 1

    @property
    def real_tokens(self) -> int:
        """Of a step: all but padding."""
        return int((self.batch["segment_ids"] > 0).sum())

    @property
    def tokens_a_rank(self) -> float:
        """The same, of the mean rank."""
        return self.real_tokens / self.ranks

    @property
    def documents(self) -> list[int]:
        """Lengths of a step's segments."""
        ids = self.batch["segment_ids"]
        rows = ids.reshape(-1, ids.shape[-1])
        return [int(n) for row in rows for n in np.bincount(row)[1:] if n]


class _Documents:
    """Random tokens cut into documents: what the packer takes for examples."""

    def __init__(self, lengths: np.ndarray, vocabulary: int, sequence_length: int) -> None:
        self.lengths, self.vocabulary = lengths, vocabulary
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([1, int(index)])
        length = int(self.lengths[index])
        weights = np.ones(length, np.float32)
        weights[0] = 0
        return Example(rng.integers(0, self.vocabulary, length, np.int32), weights)


def document_lengths(count: int, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths of documents, int [count], log-normal, from `SHORTEST` to `longest`."""
    drawn = np.random.default_rng(seed).lognormal(math.log(MEDIAN), SIGMA, count)
    return np.clip(drawn, min(SHORTEST, longest), longest).astype(np.int64)


def make_case(rank: Rank, rows: str) -> Case:
    """The rows of one step of the ranks at hand, no two alike."""
    shape = (rank.config.train.accumulate, rank.rows * rank.here, rank.length)
    vocabulary = rank.model.vocab_size
    if rows == "constant":
        tokens = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
        positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape).copy()
        ones = np.ones(shape, np.int32)
        return Case(
            rows,
            {
                "tokens": tokens,
                "loss_weights": ones.astype(np.float32),
                "positions": positions,
                "segment_ids": ones,
            },
            rank.here,
        )
    lengths = document_lengths(DOCUMENTS * rank.here, rank.length)
    documents: Any = _Documents(lengths, vocabulary, rank.length)
    batches = iter(packed_batches(documents, shape[0] * shape[1], 0, True, True, True))
    seen = [next(batches) for _ in range(SETTLED + SEEN)][SETTLED:]
    filled = [(batch["segment_ids"] > 0).sum() for batch in seen]
    typical = int(np.abs(np.subtract(filled, np.mean(filled))).argmin())
    batch = {key: value.reshape(shape) for key, value in seen[typical].items()}
    return Case(rows, batch, rank.here)


def skewed_bias(model: ModelConfig, ranks: int, seed: int = 0) -> np.ndarray:
    """Correction biases [layers with experts, experts]: the same values for each rank, shuffled.

    Every rank has as many favoured and neglected experts, so that the ranks stay about as busy as each
    other and only their experts differ.
    """
    here = model.n_routed_experts // ranks
    mean = model.num_experts_per_tok / model.n_routed_experts
    one_rank = np.zeros(here, np.float32)
    hot = max(1, here // HOT_SHARE)
    one_rank[:hot] = _score(mean) - _score(min(0.5, HOT_TIMES * mean))
    one_rank[hot : hot + max(1, here // COLD_SHARE)] = _score(mean) - _score(COLD_TIMES * mean)
    rng = np.random.default_rng(seed)
    layers = range(model.num_moe_layers)
    return np.stack(
        [np.concatenate([rng.permutation(one_rank) for _ in range(ranks)]) for _ in layers]
    )


def routed_base(rank: Rank, base: dict[str, Any], routing: str) -> dict[str, Any]:
    """The base with the router's biases of a kind of routing; every other array is the same one."""
    if routing == "natural":
        return base
    bias = skewed_bias(rank.model, rank.ranks.expert)
    assert base[BIAS].shape == bias.shape
    return base | {BIAS: rank.ranks.put(bias, rank.model_def.base_specs[BIAS])}


def _score(chosen: float) -> float:
    """The sigmoid of a unit normal that is exceeded with this probability."""
    return 1 / (1 + math.exp(-NormalDist().inv_cdf(1 - chosen)))
