"""The sections, as methods of what the processes that measure them hold on their devices."""

import argparse
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
from rich.console import Console

from kimi_jax.parallel.ranks import Ranks, abstract_ranks, make_ranks
from kimi_jax.planning.fits import check_fits, device_memory
from tools.node_bench import tables
from tools.node_bench.cases import (
    AHEAD,
    BLOCKED,
    Wanted,
    measure_cases,
    memory_of,
    whole,
)
from tools.node_bench.checkpoint import measure_checkpoint
from tools.node_bench.decoding import measure_decoding
from tools.node_bench.importing import SYNTHETIC, measure_import
from tools.node_bench.record import WRONG, Record, Section, Skipped, told
from tools.node_bench.runner import MESH, RANK, WORKERS
from tools.node_bench.size import Node
from tools.step_bench.cases import routed_base
from tools.step_bench.floors import Rates
from tools.step_bench.machine import Startup, ceilings, has_gpu
from tools.step_bench.measuring import Bench
from tools.step_bench.rank import Rank, make_base, make_rank, make_state
from tools.step_bench.tables import print_startup, print_traced
from tools.step_bench.trace import Event, break_down, exchanges

# cuDNN's attention at 4 × 2048, as `tools/bench_step.py` assumes it: forward, forward and backward.
ATTENTION = (510e12, 381e12)
BATCHES = (1, 32)  # prompts decoded together


class Worker:
    """One process's model on its ranks, made when a section first needs it."""

    def __init__(
        self, node: Node, options: argparse.Namespace, record: Record, console: Console
    ) -> None:
        self.node, self.options = node, options
        self.record, self.console = record, console
        self.startup = Startup()
        jax.devices()
        self.startup.done("devices found")

    def sections(self, kind: str) -> Mapping[str, Section]:
        """What this kind of process can measure, by name."""
        return {name: getattr(self, name) for name, of in WORKERS.items() if of == kind}

    @cached_property
    def ranks(self) -> Ranks:
        """One alone, or all on the node's devices."""
        return make_ranks(self.node.config.mesh)

    @cached_property
    def rank_here(self) -> Rank:
        """The model's structure on those ranks."""
        return make_rank(self.node.config, self.node.model, self.ranks)

    @cached_property
    def base(self) -> dict[str, Any]:
        """Random base weights."""
        config, model, ranks = self.node.config, self.node.model, self.ranks
        check_fits(config, model, ranks, device_memory(jax.local_devices()), ranks.count)
        base = make_base(self.rank_here)
        self.startup.done("base weights made on the devices")
        return base

    @cached_property
    def _first_state(self) -> Any:
        assert self.base  # the larger first
        state = jax.block_until_ready(make_state(self.rank_here))
        self.startup.done("adapters and moments made")
        return state

    @property
    def state(self) -> Any:
        """Adapters and moments as the steps left them, or as they begin."""
        bench = self.__dict__.get("bench")
        state = bench.state if bench else self._first_state
        return state if whole(state) else make_state(self.rank_here)

    @cached_property
    def bench(self) -> Bench:
        """The compiled step."""
        state = self._first_state
        del self.__dict__["_first_state"]  # the step takes its arrays
        return Bench(self.rank_here, self.base, state, self.startup.done)

    @cached_property
    def rates(self) -> Rates:
        """This GPU's, for floors."""
        found = ceilings()
        return Rates(found["matmul"], found["copy"], *ATTENTION)

    def steps(self, found: dict[str, Any], wanted: list[Wanted]) -> None:
        """Compiles the step, runs cases of it, and looks at one of them in the profiler."""
        bench, console = self.bench, self.console
        found |= {
            "startup": self.startup.to_json(),
            "first_step_s": bench.first,
            "compiling": bench.compiling,
            "compiler_bytes": bench.report.total,
            "collectives": bench.report.to_json()["collectives"],
            "plan_bytes": bench.plan.program,
            "kernels": bench.report.implementation,
        }
        print_startup(console, self.startup)
        console.print(bench.report.implementation)
        cases: list[dict[str, Any]] = found.setdefault("cases", [])

        def done() -> None:
            found["memory"] = memory_of(bench.rank.here)
            self.record.save()
            tables.print_case(console, cases[-1])

        measure_cases(bench, wanted, cases, told, done)
        tables.print_cases(console, found, bench.rank)
        failed = [case for case in cases if "error" in case]
        if has_gpu() and len(failed) < len(cases):
            self._look(found, wanted[0])
        assert not failed, "; ".join(f"{c['rows']}, {c['how']}: {c['error']}" for c in failed)
        assert all(case["finite"] for case in cases), "a step was not finite"

    def _look(self, found: dict[str, Any], wanted: Wanted) -> None:
        """What ran beside what, in a step of the program as it was measured."""
        bench = self.bench
        placed = bench.rank.place(bench.case(wanted.rows).batch)
        base = routed_base(bench.rank, bench.base, wanted.routing)
        events = bench.events(bench.compiled, base, placed)
        if not events:
            self.console.print("No GPU in the profiler's trace.")
            return
        self._overlapped(found, events, "the program as measured")
        first = next(iter(events.values()))
        # Kernels of a command buffer do not say where they come from: products are not told apart.
        found["usual"] = break_down(first, bench.compiled.as_text() or "").to_json()

    def _overlapped(
        self, found: dict[str, Any], events: Mapping[int, list[Event]], of: str
    ) -> None:
        received = self.bench.traffic().received() if self.bench.rank.here > 1 else 0.0
        spans = {device: exchanges(those) for device, those in events.items()}
        found["received_bytes"] = received
        found["overlap"] = tables.overlap_rows(spans, received)
        self.record.save()
        tables.print_overlap(self.console, found["overlap"], of)

    def break_down(self, found: dict[str, Any], of: str) -> None:
        """Where a step's time goes on the first GPU, by the parts of the model; `of`: the step's section."""
        if not has_gpu():
            raise Skipped("no GPU: the profiler sees no kernels")
        before = self.record.section(of)
        if before["state"] in WRONG and all("error" in case for case in before.get("cases", [])):
            raise Skipped(f"section {of} could not make a step")  # which takes minutes to find out
        bench = self.bench
        measured = bench.run("natural", "constant", 2)
        traces = bench.trace([measured], self.rates, self.options.keep_trace)
        if not traces:
            raise Skipped("the profiler saw no kernels")
        traced = traces[0]
        found |= {
            "step_s_without_command_buffers": traced.seconds,
            "idle_share_as_measured": traced.idle,
            "floors": [
                {"part": part, "phase": phase, "seconds": floor.seconds, "why": floor.why}
                for (part, phase), floor in traced.floors.items()
            ],
        } | traced.breakdown.to_json()
        self._overlapped(found, traced.events, "without command buffers")
        print_traced(self.console, traced)


class RankWorker(Worker):
    """One rank alone, on the first GPU."""

    @cached_property
    def ranks(self) -> Ranks:
        """One of as many as the node has; copies of its own in place of what it would receive."""
        return abstract_ranks(self.node.config.mesh)

    def rank(self, found: dict[str, Any]) -> None:
        """The work of each GPU, without the exchanges."""
        few = max(2, self.options.few)
        self.console.print("A rank alone: its losses mean nothing.")
        self.steps(found, [Wanted("constant", BLOCKED, few), Wanted("constant", AHEAD, few)])

    def rank_breakdown(self, found: dict[str, Any]) -> None:
        """Its parts."""
        self.break_down(found, "rank")


class MeshWorker(Worker):
    """All ranks, on as many GPUs."""

    def step(self, found: dict[str, Any]) -> None:
        """The real step: steady, blocked, and of packed rows."""
        few = max(2, self.options.few)
        wanted = [
            Wanted("constant", BLOCKED, few),
            Wanted("constant", AHEAD, self.options.steps),
            Wanted("packed", AHEAD, 2 * few),
            Wanted("constant", AHEAD, few, "skewed"),
        ]
        self.steps(found, wanted)

    def breakdown(self, found: dict[str, Any]) -> None:
        """The parts of the step on the first GPU."""
        self.break_down(found, "step")

    def checkpoint(self, found: dict[str, Any]) -> None:
        """Adapters and moments, saved and restored."""
        found["updates_made"] = int(self.state.step)
        measure_checkpoint(self.state, self.options.directory, found, self.record.save)
        tables.print_checkpoint(self.console, found)

    def decode(self, found: dict[str, Any]) -> None:
        """Tokens a second with the latent cache."""

        def done(row: dict[str, Any]) -> None:
            self.record.save()
            tables.print_decoded(self.console, row)

        adapters, new = self.state.adapters, self.options.new_tokens
        measure_decoding(self.rank_here.model_def, self.base, adapters, BATCHES, new, found, done)


class ImportWorker(Worker):
    """All ranks, without a model."""

    def import_(self, found: dict[str, Any]) -> None:
        """A checkpoint's files onto the devices."""
        measure_import(
            self.options.directory / SYNTHETIC,
            self.ranks,
            found,
            self.record.save,
            lambda line: print(line, flush=True),
        )
        found["memory"] = memory_of(self.node.devices)

    def sections(self, kind: str) -> Mapping[str, Section]:
        """The one, whose name is a word of the language."""
        return {"import": self.import_}


def make_worker(
    kind: str, node: Node, options: argparse.Namespace, record: Record, console: Console
) -> Worker:
    """The process's own, for sections of this kind."""
    made = {RANK: RankWorker, MESH: MeshWorker}.get(kind, ImportWorker)
    return made(node, options, record, console)
