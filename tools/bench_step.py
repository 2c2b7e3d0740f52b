"""One rank's real train step on one device: speed, memory, where the time goes, and what is missing.

    python tools/bench_step.py --config configs/k2_thinking_8xh200.yaml [--layers N] [--json FILE]
        [--routing natural|skewed|both] [--rows constant|packed|both] [--lengths 2048,8192]
        [section.field=value …]

The device does what one of the run's devices would do: its experts for all ranks' rows, its part of the
vocabulary and of all other weights. What it would receive from the others is made of copies of its own
data, so the loss means nothing, and training refuses this mode: it is for measuring. Weights are random,
in their packed format, made on the device. With JAX_COMPILATION_CACHE_DIR set, a second run shows what
starting again costs. Without a GPU everything but the breakdown runs, for a small model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console

from kimi_jax.command import run_command
from kimi_jax.config_file import load_config
from kimi_jax.memory_settings import allow_jax_memory
from kimi_jax.planning.memory import read_architecture
from tools.step_bench import cases
from tools.step_bench.floors import Rates
from tools.step_bench.machine import Startup, ceilings, describe
from tools.step_bench.measuring import Bench, Measured, Traced
from tools.step_bench.parts import EXCHANGES
from tools.step_bench.rank import make_base, make_rank, make_state, with_rows
from tools.step_bench.tables import print_cases, print_startup, print_traced, print_traffic


def arguments(given: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--layers", type=int, help="instead of the checkpoint's")
    parser.add_argument("--steps", type=int, default=3, help="timed, of each case")
    parser.add_argument("--routing", choices=(*cases.ROUTINGS, "both"), default="both")
    parser.add_argument("--rows", choices=(*cases.ROWS, "both"), default="both")
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(length) for length in text.split(",")],
        help="of rows, with as many tokens on the GPU, at least one row; each compiles",
    )
    parser.add_argument(
        "--trace", choices=("none", "first", "all"), default="first", help="cases to break down"
    )
    parser.add_argument("--keep-trace", type=Path, help="directory for the profiler's files")
    parser.add_argument("--gather-gbs", type=float, default=243, help="received by a gather, GB/s")
    parser.add_argument("--scatter-gbs", type=float, default=240, help="received by a sum, GB/s")
    parser.add_argument(
        "--attention-tflops",
        type=lambda text: [float(rate) for rate in text.split(",")],
        default=[510, 381],
        help="floors of attention: forward, forward and backward (default: cuDNN's at 4 × 2048)",
    )
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_args(given)


def both(choice: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The chosen one, or all."""
    return names if choice == "both" else (choice,)


def one_length(
    console: Console, bench: Bench, options: argparse.Namespace, rates: Rates, trace: str
) -> dict[str, Any]:
    """Measures and prints every case of a row length."""
    measured: list[Measured] = []
    for routing in both(options.routing, cases.ROUTINGS):
        for rows in both(options.rows, cases.ROWS):
            measured.append(bench.run(routing, rows, options.steps))
            console.print(f"{measured[-1].name}: {measured[-1].best:.3f} s", highlight=False)
    print_cases(console, bench, measured)
    traced: list[Traced] = []
    if trace != "none":
        chosen = measured if trace == "all" else measured[:1]
        traced = bench.trace(chosen, rates, options.keep_trace)
        for one in traced:
            print_traced(console, one)
        if not traced:
            console.print("No GPU in the profiler's trace, so no breakdown.")
    copies = traced[0].breakdown.of(EXCHANGES) if traced else 0.0
    bandwidths = (options.gather_gbs * 1e9, options.scatter_gbs * 1e9)
    return {
        "length": bench.rank.length,
        "rows": bench.rank.rows,
        "first_step_s": bench.first,
        "compiling": bench.compiling,
        "compiler_bytes": bench.report.total,
        "plan_bytes": bench.plan.program,
        "standing_bytes": bench.standing,
        "kernels": bench.report.implementation,
        "cases": [one.to_json() for one in measured],
        "traced": [traced_json(one) for one in traced],
        "exchange": print_traffic(console, bench.traffic(), bandwidths, measured[0], copies),
    }


def traced_json(traced: Traced) -> dict[str, Any]:
    """A breakdown and its floors."""
    floors = [
        {"part": part, "phase": phase, "seconds": floor.seconds, "why": floor.why}
        for (part, phase), floor in traced.floors.items()
    ]
    program = {
        "step_s_without_command_buffers": traced.seconds,
        "idle_share_as_measured": traced.idle,
        "floors": floors,
    }
    return {"case": traced.of.name} | traced.breakdown.to_json() | program


def main(given: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, prints tables and writes JSON if asked to."""
    allow_jax_memory(0.95)
    given = sys.argv[1:] if given is None else list(given)
    options, console = arguments(given), Console(width=None if sys.stdout.isatty() else 170)
    startup = Startup()
    config = load_config(options.config, options.overrides)
    model = read_architecture(config)
    if options.layers is not None:
        model = replace(model, num_hidden_layers=options.layers)
    machine = describe(given, options.overrides)
    startup.done("device found")
    for name, value in machine.items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    lengths = options.lengths or [config.train.sequence_length]
    rank = make_rank(config, model)
    base = make_base(rank)
    startup.done("base weights made on the device")
    tokens = rank.tokens
    result: dict[str, Any] = {"machine": machine, "layers": model.num_hidden_layers, "lengths": []}
    for number, length in enumerate(lengths):
        rank = make_rank(with_rows(config, length, tokens), model)
        state = make_state(rank)
        done = startup.done if number == 0 else lambda _: None
        done("adapters and moments made")
        bench = Bench(rank, base, state, done)
        del state
        if number == 0:
            print_startup(console, startup)
            result |= {"startup": startup.to_json(), "ceilings": ceilings()}
            found = result["ceilings"]
            console.print(
                f"bf16 product {found['size']}³: {found['matmul'] / 1e12:.0f} TFLOP/s; device copy: "
                f"{found['copy'] / 1e12:.2f} TB/s"
            )
            for name in (*cases.ROUTINGS, *cases.ROWS):
                console.print(f"{name}: {cases.HOW[name]}", highlight=False)
        forward, both_ways = (rate * 1e12 for rate in options.attention_tflops)
        rates = Rates(found["matmul"], found["copy"], forward, both_ways)
        trace = options.trace if number == 0 or options.trace == "all" else "none"
        result["lengths"].append(one_length(console, bench, options, rates, trace))
        if options.json:  # after each length: a later one may not fit
            options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
        del bench


if __name__ == "__main__":
    run_command(main)
