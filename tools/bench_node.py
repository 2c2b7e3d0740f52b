"""A whole node, one process driving all its GPUs: the step, one rank of it, checkpoints, import, decoding.

    python tools/bench_node.py --config configs/k2_thinking_8xh200.yaml [--devices N]
        [--sections rank step …] [--json FILE] [--limit SECONDS] [section.field=value …]

Weights are random, in their packed format, made on the devices. With fewer GPUs than the recipe has, each
holds and computes what one of the recipe's would: the number of experts shrinks, not their number on a GPU.

Each section runs in a process of its own, but for those on the same ranks that follow each other:

    rank             one rank alone on one GPU, copies of its own rows in place of exchanges
    step             the train step on all GPUs: steady (one step ahead of the host), blocked, packed rows,
                     and skewed routing
    breakdown        its parts on the first GPU, by a program without command buffers; compiles once more
    checkpoint       adapters and moments saved and restored
    decode           tokens a second with the latent cache
    import           a synthetic checkpoint onto all GPUs, cold and warm; written while `rank` compiles
    rank_breakdown   as breakdown, of the rank alone; if asked for

With --compile-ahead the programs of all GPUs' steps are compiled while `rank` runs.

What was found is in the JSON file after every case; a section that fails does not stop the others, and the
exit code is 1 then. At the limit whatever runs is stopped. Without a GPU all but traces runs, for a small
model.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console

from kimi_jax.command import run_command
from kimi_jax.config_file import load_config
from kimi_jax.memory_settings import allow_jax_memory
from kimi_jax.weights.reader import INDEX
from tools.node_bench import tables
from tools.node_bench.ahead import compile_step, environment
from tools.node_bench.comparison import compare
from tools.node_bench.importing import SYNTHETIC, room, write_synthetic
from tools.node_bench.record import WRONG, Record, run_sections
from tools.node_bench.runner import COMPILE, COMPILE_TRACED, MESH, PREPARED, WORKERS, WRITE, Runner
from tools.node_bench.size import Node, cut
from tools.node_bench.worker import make_worker
from tools.step_bench import cases
from tools.step_bench.machine import describe, seconds_since_start

SECTIONS = ("rank", "step", "breakdown", "checkpoint", "decode", "import")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--devices", type=int, help="GPUs; all there are, at most the recipe's")
    parser.add_argument("--experts-a-rank", type=int, help="of a layer, on each GPU")
    parser.add_argument("--layers", type=int, help="instead of the checkpoint's")
    parser.add_argument(
        "--sections", nargs="+", metavar="SECTION", default=list(SECTIONS), help="in this order"
    )
    parser.add_argument("--steps", type=int, default=30, help="steady steps of constant rows")
    parser.add_argument(
        "--few",
        type=int,
        default=5,
        help="steps of a rank alone, and blocked; packed: twice as many",
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded behind each prompt")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument(
        "--limit", type=float, default=570, help="seconds until what runs is stopped"
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/bench_node"), help="for checkpoints' files"
    )
    parser.add_argument("--gib", type=float, default=40, help="of the checkpoint, at most")
    parser.add_argument(
        "--compile-ahead",
        action="store_true",
        help="all GPUs' programs beside `rank`, into JAX_COMPILATION_CACHE_DIR; saves minutes",
    )
    parser.add_argument("--keep-files", action="store_true", help="leave the synthetic checkpoint")
    parser.add_argument("--keep-trace", type=Path, help="directory for the profiler's files")
    parser.add_argument("--worker", type=lambda text: text.split(","), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args(given)
    # Overrides may stand right behind the sections.
    options.overrides += [name for name in options.sections if "=" in name]
    options.sections = [name for name in options.sections if "=" not in name]
    unknown = [name for name in options.sections if name not in WORKERS]
    if unknown or not options.sections:
        parser.error(f"--sections: {' '.join(unknown) or 'none'}; known: {', '.join(WORKERS)}")
    if options.compile_ahead and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        parser.error("--compile-ahead: JAX_COMPILATION_CACHE_DIR must name a directory")
    if options.new_tokens < 2 or options.steps < 2:
        parser.error("--new-tokens and --steps must be at least 2")
    return options


def worker(options: argparse.Namespace, given: Sequence[str], node: Node, console: Console) -> int:
    """What a process of the bench's own does: its sections, or the writing of a checkpoint."""
    directory = options.directory / SYNTHETIC
    if options.worker == [WRITE]:
        written = write_synthetic(directory, options.gib)
        console.print(
            f"wrote {written['bytes'] / 1e9:.2f} GB of a checkpoint in {written['seconds']:.1f} s",
            highlight=False,
        )
        return 0
    if (what := options.worker[0]) in PREPARED[MESH]:
        seconds = compile_step(node, what == COMPILE_TRACED)
        console.print(f"{what}: {seconds.describe()}", highlight=False)
        return 0
    record = Record(options.json)
    made = make_worker(WORKERS[options.worker[0]], node, options, record, console)
    if "machine" not in record.values:
        command = list(given[: given.index("--worker")])
        record.values["machine"] = describe(command, options.overrides)
        for name, value in record.values["machine"].items():
            console.print(f"{name}: {value}", highlight=False, markup=False)
        record.save()
    return run_sections(options.worker, made.sections(WORKERS[options.worker[0]]), record, console)


def start(arguments: Sequence[str], changes: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """A process of this script, in an environment with these changes."""
    return subprocess.Popen([sys.executable, __file__, *arguments], env={**os.environ, **changes})


def measure(options: argparse.Namespace, given: Sequence[str], node: Node, console: Console) -> int:
    """Runs the sections, compares, sums up; the exit code."""
    synthetic = options.directory / SYNTHETIC
    write = "import" in options.sections and not (synthetic / INDEX).is_file()
    others = node.saved_bytes if "checkpoint" in options.sections else 0
    gib = room(options.directory, options.gib, others)
    record = Record(options.json)
    record.values |= {"node": node.to_json(), "how": dict(cases.HOW), "sections": {}}
    record.values.pop("machine", None)
    record.save()
    console.print(node.describe(), highlight=False)
    if node.missing:
        missing = "; ".join(node.missing)
        console.print(f"NOT THE WHOLE MODEL: {missing}.", style="bold", highlight=False)

    def begin(names: Sequence[str]) -> "subprocess.Popen[bytes]":
        own = ["--worker", ",".join(names), "--json", str(options.json), "--gib", f"{gib}"]
        changes = environment(node.devices) if names[0] in PREPARED[MESH] else {}
        return start([*given, *own], changes)

    runner = Runner(begin, options.limit, record, console)
    try:
        prepare = [WRITE] * write
        if options.compile_ahead:
            prepare += [COMPILE] + [COMPILE_TRACED] * ("breakdown" in options.sections)
        runner.run(options.sections, prepare)
    finally:
        record.load()
        if write and not options.keep_files:
            shutil.rmtree(synthetic, ignore_errors=True)
        console.rule(f"{seconds_since_start():.0f} s after the command")
        if compared := compare(record.sections):
            record.values["comparison"] = compared
            tables.print_comparison(console, compared)
        record.values["seconds"] = seconds_since_start()
        record.save()
        tables.print_summary(console, record.sections)
        if node.missing:
            console.print(f"Not the whole model: {'; '.join(node.missing)}.", highlight=False)
    return int(any(found["state"] in WRONG for found in record.sections.values()))


def main(given: Sequence[str] | None = None) -> None:
    """Reads the command line and measures, or does a worker's part."""
    allow_jax_memory(0.95)
    given = sys.argv[1:] if given is None else list(given)
    options = arguments(given)
    console = Console(width=None if sys.stdout.isatty() else 150)
    recipe = load_config(options.config, options.overrides)
    node = cut(recipe, options.devices, options.experts_a_rank, options.layers)
    if options.worker:
        sys.exit(worker(options, given, node, console))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the file is left whole, workers end
    with tempfile.TemporaryDirectory() as temporary:
        if options.json is None:
            options.json = Path(temporary) / "results.json"
        else:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        code = measure(options, given, node, console)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_command(main)
