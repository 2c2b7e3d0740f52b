"""Steps one ahead of the host, as the training loop makes them, and blocked ones; what they show."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kimi_jax.training.step import StepMetrics
from tools.step_bench.cases import Case, routed_base
from tools.step_bench.loads import loads
from tools.step_bench.machine import memory
from tools.step_bench.measuring import Bench
from tools.step_bench.rank import make_state

AHEAD, BLOCKED = "one ahead", "blocked"


class Wanted(NamedTuple):
    """rows, routing: kinds of `tools.step_bench.cases`. how: `AHEAD` or `BLOCKED`."""

    rows: str
    how: str
    steps: int
    routing: str = "natural"


class Steps(NamedTuple):
    """seconds: of each step, from one completion to the next. metrics: of each, on the host."""

    seconds: list[float]
    metrics: list[StepMetrics]


def run_ahead(bench: Bench, case: Case, base: Mapping[str, Any], steps: int) -> Steps:
    """Each step is handed to the devices before the figures of the one before are read.

    The rows are sent anew for each step, and it is told on the devices whether the one before was finite.
    """
    metrics: list[StepMetrics] = []
    ends = [time.perf_counter()]
    flying: StepMetrics | None = None

    def land(flight: StepMetrics) -> None:
        metrics.append(jax.device_get(flight))
        ends.append(time.perf_counter())

    for _ in range(steps):
        placed = bench.rank.place(case.batch)
        after = None if flying is None else flying.finite
        following = bench.step(bench.compiled, base, placed, after)
        for value in following:
            value.copy_to_host_async()
        if flying is not None:
            land(flying)
        flying = following
    if flying is not None:
        land(flying)
    return Steps(np.diff(ends).tolist(), metrics)


def run_blocked(bench: Bench, case: Case, base: Mapping[str, Any], steps: int) -> Steps:
    """Each step is awaited before the next is handed over."""
    placed = jax.block_until_ready(bench.rank.place(case.batch))
    seconds, metrics = [], []
    for _ in range(steps):
        began = time.perf_counter()
        made = bench.step(bench.compiled, base, placed)
        jax.block_until_ready((bench.state, made))
        seconds.append(time.perf_counter() - began)
        metrics.append(jax.device_get(made))
    return Steps(seconds, metrics)


def measure_case(bench: Bench, wanted: Wanted) -> dict[str, Any]:
    """Runs a case; nothing is compiled. Returns what the JSON file gets; rates are of all its time."""
    case = bench.case(wanted.rows)
    run = run_ahead if wanted.how == AHEAD else run_blocked
    base = routed_base(bench.rank, bench.base, wanted.routing)
    made = run(bench, case, base, wanted.steps)
    mean = statistics.mean(made.seconds)
    rate = case.real_tokens / mean
    last = made.metrics[-1]
    return wanted._asdict() | {
        "seconds": made.seconds,
        "mean_s": mean,
        "median_s": statistics.median(made.seconds),
        "best_s": min(made.seconds),
        "real_tokens": case.real_tokens,
        "padding_share": 1 - case.real_tokens / case.batch["tokens"].size,
        "documents": len(case.documents),
        "tokens_a_second": rate,
        "tokens_a_second_gpu": rate / case.ranks,
        "mfu": bench.mfu(rate / case.ranks),
        "losses": [float(one.loss) for one in made.metrics],
        "grad_norms": [float(one.grad_norm) for one in made.metrics],
        "finite": all(bool(one.finite) for one in made.metrics),
        "loads": [
            loads(bench.rank, np.asarray(last.expert_load), case.real_tokens, number).to_json()
            for number in range(bench.rank.here)
        ],
    }


def measure_cases(
    bench: Bench,
    wanted: Sequence[Wanted],
    cases: list[dict[str, Any]],
    told: Callable[[BaseException], dict[str, str]],
    done: Callable[[], None],
) -> None:
    """Runs cases one after the other; one that fails does not take the others along.

    Where steps one ahead of the host fail (they may need more memory), the same steps follow, blocked.

    Args:
        bench: the compiled step.
        wanted: the cases.
        cases: gets what each found, or its error.
        told: an error as what the JSON file gets.
        done: called after each case.
    """
    waiting = list(wanted)
    while waiting:
        case = waiting.pop(0)
        try:
            cases.append(measure_case(bench, case))
        except Exception as error:
            cases.append(case._asdict() | told(error))
            if not whole(bench.state):
                bench.state = make_state(bench.rank)
            if case.how == AHEAD:
                waiting.insert(0, case._replace(how=BLOCKED))
        done()


def whole(state: Any) -> bool:
    """Whether every array of a state is still there: a step that fails may have taken it along."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def memory_of(count: int) -> list[dict[str, int]]:
    """Of each device: bytes in use now and at the most since the process began, and what JAX may use."""
    return [
        {
            "device": number,
            "in_use": memory("bytes_in_use", number),
            "peak": memory("peak_bytes_in_use", number),
            "limit": memory("bytes_limit", number),
        }
        for number in range(count)
    ]
