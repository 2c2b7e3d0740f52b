"""Runs the cases of one row length: one lowering, one compiled program, and one more to be traced."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kimi_jax.parallel.ranks import REPLICATED
from kimi_jax.planning.arrays import ADAPTERS, adapter_bytes
from kimi_jax.planning.flops import token_flops
from kimi_jax.planning.memory import ITEMSIZE
from kimi_jax.training.step import StepMetrics
from tools.step_bench.cases import Case, make_case, routed_base
from tools.step_bench.exchange import Traffic, traffic
from tools.step_bench.floors import Floors, Rates, Work, floors
from tools.step_bench.loads import Loads, loads
from tools.step_bench.machine import DATASHEET, has_gpu, memory
from tools.step_bench.parts import IDLE
from tools.step_bench.rank import Rank
from tools.step_bench.trace import NO_COMMAND_BUFFERS, Breakdown, Event, break_down, traced


@dataclass(frozen=True)
class Measured:
    """Steps of one case.

    seconds: of each step, host clock around a blocked call. loads: of the first rank. peak: bytes of the
    first device, of the process so far. loss: that of a rank alone means nothing. mfu: of the datasheet's
    peak, by convention.
    """

    routing: str
    case: Case
    seconds: list[float]
    loads: Loads
    peak: int
    loss: float
    finite: bool
    mfu: dict[str, float]

    @property
    def name(self) -> str:
        """Routing and rows."""
        return f"{self.routing}, {self.case.rows}"

    @property
    def best(self) -> float:
        """Seconds of the fastest step."""
        return min(self.seconds)

    @property
    def tokens_a_second(self) -> float:
        """Real tokens on one GPU, by the median step."""
        return self.case.tokens_a_rank / statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        padded = self.case.batch["tokens"].size
        return {
            "routing": self.routing,
            "rows": self.case.rows,
            "seconds": self.seconds,
            "best_s": self.best,
            "median_s": statistics.median(self.seconds),
            "real_tokens": self.case.real_tokens,
            "documents": len(self.case.documents),
            "padding_share": 1 - self.case.real_tokens / padded,
            "tokens_a_second": self.tokens_a_second,
            "mfu": self.mfu,
            "peak_bytes_so_far": self.peak,
            "loss_without_meaning": self.loss,
            "finite": self.finite,
            "loads": self.loads.to_json(),
        }


@dataclass(frozen=True)
class Traced:
    """A case's step by the kernels of the first GPU.

    seconds: of the program without command buffers, not traced. breakdown: of that program. idle: share of
    a traced step of the program as it is measured in which nothing ran. events: of each GPU, without
    command buffers.
    """

    of: Measured
    seconds: float
    breakdown: Breakdown
    floors: Floors
    idle: float
    events: dict[int, list[Event]]


class Bench:
    """The compiled step of one row length on the ranks at hand, and what is passed from step to step.

    `done` is told each phase of making it that ends.
    """

    def __init__(
        self, rank: Rank, base: dict[str, Any], state: Any, done: Callable[[str], None]
    ) -> None:
        self.rank, self.base, self.state = rank, base, state
        self.cases: dict[str, Case] = {}
        self.standing = memory("bytes_in_use")
        self.sound = rank.ranks.put(np.bool_(True), REPLICATED)
        arguments = (state, base, self._batch("constant"), self.sound)
        self.program = rank.program()
        self.compiled = self.program.compile(*arguments)
        done("train step " + self.program.seconds.describe())
        self.compiling = self.program.seconds._asdict()
        self.first = self._timed(self.compiled, base, arguments[2])[0]
        done("first step")
        self.report = rank.report(self.compiled)
        self.plan = rank.plan()

    def run(self, routing: str, rows: str, steps: int) -> Measured:
        """Measures one case; nothing is compiled."""
        batch, base = self._batch(rows), routed_base(self.rank, self.base, routing)
        seconds = []
        for _ in range(steps):
            spent, metrics = self._timed(self.compiled, base, batch)
            seconds.append(spent)
        case = self.cases[rows]
        load = np.asarray(metrics.expert_load)
        return Measured(
            routing,
            case,
            seconds,
            loads(self.rank, load, case.real_tokens),
            memory("peak_bytes_in_use"),
            float(metrics.loss),
            bool(metrics.finite),
            self.mfu(case.tokens_a_rank / statistics.median(seconds)),
        )

    def mfu(self, rate: float) -> dict[str, float]:
        """Of the datasheet's peak, for so many real tokens a second on one GPU."""
        rank, train = self.rank, self.rank.config.train
        flops = token_flops(rank.table, rank.model, train.recompute, rank.length, train.spared)
        return {
            "4N": flops.frozen * rate / DATASHEET,
            "with_recompute": flops.recomputed * rate / DATASHEET,
        }

    def trace(self, cases: list[Measured], rates: Rates, keep: Path | None) -> list[Traced]:
        """Compiles once more without command buffers, and traces one step of each of these cases.

        Without a GPU there are no kernels to tell apart, and nothing is compiled.
        """
        if not has_gpu():
            return []
        arguments = (self.state, self.base, self._batch("constant"), self.sound)
        compiled = self.program.compile(*arguments, options=NO_COMMAND_BUFFERS)
        text, found = compiled.as_text() or "", []
        for case in cases:
            batch = self._batch(case.case.rows)
            base = routed_base(self.rank, self.base, case.routing)
            self._timed(compiled, base, batch)
            seconds, _ = self._timed(compiled, base, batch)

            events = self.events(compiled, base, batch, keep)
            as_measured = self.events(self.compiled, base, batch)
            if not events or not as_measured:
                continue
            usual = break_down(as_measured[min(as_measured)], "")
            idle = usual.of(IDLE) / usual.span
            breakdown = break_down(events[min(events)], text)
            found.append(Traced(case, seconds, breakdown, self.floors(case, rates), idle, events))
        return found

    def floors(self, measured: Measured, rates: Rates) -> Floors:
        """Of one step of a case."""
        rank, train = self.rank, self.rank.config.train
        plan = rank.model_def.plan.values()
        ranks_of_experts = [a.rank for a in plan if a.weight.role == "routed"]
        trained = adapter_bytes(rank.model_def.plan, rank.ranks)
        work = Work(
            model=rank.model,
            table=rank.table,
            ranks=rank.ranks.expert,
            tokens=rank.tokens * train.accumulate,
            squares=round(sum(n**2 for n in measured.case.documents) / measured.case.ranks),
            received=float(measured.loads.received.sum()) * train.accumulate,
            itemsize=ITEMSIZE[rank.config.model.dtype],
            expert_rank=max(ranks_of_experts, default=0),
            trained=sum(trained.values()) // 4,
        )
        return floors(work, rates)

    def traffic(self) -> Traffic:
        """What one rank exchanges with the others in a step, or would if it is alone."""
        rank, train = self.rank, self.rank.config.train
        return traffic(
            rank.model,
            rank.table,
            rank.ranks,
            train.recompute,
            rank.tokens,
            ITEMSIZE[rank.config.model.dtype],
            adapter_bytes(rank.model_def.plan, rank.ranks)[ADAPTERS],
            train.accumulate,
        )

    def case(self, rows: str) -> Case:
        """Rows of this kind, made when they are first asked for."""
        if rows not in self.cases:
            self.cases[rows] = make_case(self.rank, rows)
        return self.cases[rows]

    def step(self, compiled: Any, base: Any, batch: Any, after: Any = None) -> StepMetrics:
        """Dispatches a step. after: `finite` of the one before, if that need not be known yet."""
        sound = self.sound if after is None else after
        self.state, metrics = compiled(self.state, base, batch, sound)
        return metrics

    def events(
        self, compiled: Any, base: Any, batch: Any, keep: Path | None = None
    ) -> dict[int, list[Event]]:
        """Of each GPU in one step."""
        return traced(lambda: (self.step(compiled, base, batch), self.state), keep)

    def _batch(self, rows: str) -> dict[str, jax.Array]:
        return jax.block_until_ready(self.rank.place(self.case(rows).batch))

    def _timed(self, compiled: Any, base: Any, batch: Any) -> tuple[float, StepMetrics]:
        began = time.perf_counter()
        metrics = self.step(compiled, base, batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began, metrics
