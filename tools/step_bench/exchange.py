"""What the ranks of the real run would send each other in a step, on paper, and what that does to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kimi_jax.config import Recompute
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.layout import in_parts
from kimi_jax.model.params import Weight
from kimi_jax.parallel.ranks import Ranks

FP32 = INT32 = 4


class Exchange(NamedTuple):
    """A kind of exchange. runs: a step. size: bytes of the whole, gathered or to be scattered, in one."""

    name: str
    kind: Literal["gather", "scatter", "all-reduce"]
    runs: int
    size: int

    def received(self, ranks: int) -> float:
        """Bytes that one rank receives in a step, and as many are sent, ring by ring."""
        turns = 2 if self.kind == "all-reduce" else 1
        return turns * self.runs * self.size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Traffic:
    """A step's exchanges of one rank, micro-batches included."""

    ranks: int
    exchanges: tuple[Exchange, ...]

    def received(self, *kinds: str) -> float:
        """Bytes a step."""
        return sum(e.received(self.ranks) for e in self.exchanges if not kinds or e.kind in kinds)

    def seconds(self, gather: float, scatter: float) -> float:
        """At so many bytes a second received, one after the other."""
        return self.received("gather") / gather + self.received("scatter", "all-reduce") / scatter


class Projection(NamedTuple):
    """Seconds of a step of all ranks, its exchanges after the computation or behind it."""

    computed: float
    shown: float
    hidden: float


def traffic(
    model: ModelConfig,
    table: Sequence[Weight],
    ranks: Ranks,
    recompute: Recompute,
    tokens: int,
    itemsize: int,
    replicated: int,
    accumulate: int = 1,
) -> Traffic:
    """The exchanges of `kimi_jax.parallel`.

    Args:
        model: the checkpoint's.
        table: its weights.
        ranks: of the run.
        recompute: a layer that is computed again gathers its rows and weights again.
        tokens: of one rank in a micro-batch.
        itemsize: bytes of an activation.
        replicated: bytes of the adapters that every rank has.
        accumulate: micro-batches a step.
    """
    visits = 1 if recompute == "none" else 2
    gathered = tokens * ranks.expert
    layers = model.num_moe_layers * accumulate
    rows = gathered * model.hidden_size * itemsize
    chosen = gathered * model.num_experts_per_tok
    parts = sum(w.bytes for w in table if in_parts(w, ranks))
    rows_of = "rows of layers with experts"
    found = (
        # To the experts, once more to compute them again, and the cotangents of what they gave.
        Exchange(f"{rows_of}, gathered", "gather", (visits + 1) * layers, rows),
        Exchange(f"{rows_of}, summed", "scatter", 2 * layers, rows),
        Exchange("chosen experts and weights", "gather", visits * layers, chosen * (INT32 + FP32)),
        Exchange("gradients of the weights", "scatter", layers, chosen * FP32),
        Exchange("weights kept in parts", "gather", visits * accumulate, parts),
        Exchange("embedded rows, summed", "scatter", accumulate, rows),
        Exchange("final rows, for the loss", "gather", accumulate, rows),
        Exchange("their gradients, summed", "scatter", accumulate, rows),
        Exchange("gradients of replicated adapters", "all-reduce", 1, replicated),
    )
    return Traffic(ranks.expert, found if ranks.expert > 1 else ())


def project(step: float, stand_ins: float, exchanged: float) -> Projection:
    """From one rank's step to that of all ranks.

    Args:
        step: seconds of the one rank alone.
        stand_ins: of it, copies in the place of exchanges.
        exchanged: seconds of the exchanges by themselves.
    """
    computed = step - stand_ins
    return Projection(computed, computed + exchanged, max(computed, exchanged))
