"""One mixture-of-experts layer of K2-Thinking, forward and backward, beside its peers on the same GPU.

    python tools/bench_peers.py [--only ours pytorch transformers] [--json FILE]

`ours` is kimi_jax, `pytorch` packed experts with `torch._grouped_mm`, `transformers` that library with
peft and bf16 experts. Two shapes: a GPU that holds all experts of the layer and sees 8,192 tokens, and
one rank of eight, which computes its experts for the rows of all. Frozen weights get no gradient, all
adapters do. Each measurement is a process of its own; one that fails is reported and the rest go on
(exit code 1). `pytorch` gets as many rows for each expert as ours had; the router of transformers'
model is its own. Operations are useful ones, 4 a parameter and row: neither recomputation nor adapters
nor attention scores.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kimi_jax.command import run_command
from kimi_jax.console import make_console
from kimi_jax.errors import UserError, listing
from kimi_jax.model.config import load_model_config
from tools.peer_benches.case import Case
from tools.peer_benches.report import OURS, Figure, as_json, difference, make_table, single
from tools.peer_benches.runner import Outcome, run_case

ROOT = Path(__file__).parents[1]
NEEDS = {
    "ours": ("jax", "flax"),
    "pytorch": ("torch", "triton", "transformers"),  # its results are compared with transformers'
    "transformers": ("torch", "transformers", "peft"),
}
PYTORCH, TRANSFORMERS = "PyTorch, int4", "transformers + peft, bf16"
WHOLE, LAYER = "dense + layer + head", "layer"
RANKS = 8
Run = Callable[[Case, float], Outcome]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, and prints the table."""
    options = parse(arguments)
    check_installed(options.only)
    figures, outcomes = measure_all(options, run_case)
    console = make_console()
    console.print(make_table(figures))
    for figure in figures:
        text = f"{figure.shape}, {figure.route}: {figure.note}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for outcome in outcomes:
        show(console, outcome)
    if options.json is not None:
        text = json.dumps(as_json(figures, outcomes), indent=1)
        options.json.write_text(f"{text}\n", encoding="utf-8")
    if any(outcome.result is None for outcome in outcomes):
        sys.exit(1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/bench_peers.py",
        description="Times a mixture-of-experts layer by several routes on this GPU.",
    )
    peers, shapes = tuple(NEEDS), ("all_experts", "one_rank")
    parser.add_argument("--only", nargs="+", choices=peers, default=list(peers))
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=list(shapes))
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "k2_thinking")
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "k2_thinking_8xh200.yaml")
    parser.add_argument("--batch", type=int, default=4, help="sequences of this GPU")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--calls", type=int, default=7, help="timed, after the warm-up")
    parser.add_argument("--limit", type=float, default=240, help="seconds of one process")
    parser.add_argument(
        "--compile-transformers",
        action="store_true",
        help="that model through torch.compile, which takes minutes",
    )
    parser.add_argument(
        "--ours", nargs="+", default=[], metavar="section.field=value", help="of the recipe"
    )
    options = parser.parse_args(arguments)
    for name in ("batch", "length", "calls"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; required: at least 1")
    for path in (options.recipe, options.config):
        if not path.exists():
            parser.error(f"{path}: not found")
    return options


def check_installed(peers: Sequence[str]) -> None:
    """Refuses to measure only some of what was asked for.

    Raises:
        UserError: a package or the GPU is missing.
    """
    missing = [
        f"{package}, which {peer} needs"
        for peer in peers
        for package in NEEDS[peer]
        if importlib.util.find_spec(package) is None
    ]
    if shutil.which("nvidia-smi") is None:
        missing.append("an NVIDIA GPU: there is no nvidia-smi")
    if missing:
        advice = "Install them, or choose what to measure with --only."
        raise UserError(listing("not found here", missing, advice))


def measure_all(options: argparse.Namespace, run: Run) -> tuple[list[Figure], list[Outcome]]:
    """All measurements that were asked for, ours first: PyTorch's rows an expert are ours."""
    load_model_config(options.config)  # says what is wrong with it before a process does
    outcomes: list[Outcome] = []
    figures: list[Figure] = []

    def once(case: Case) -> Outcome:
        outcomes.append(run(case, options.limit))
        return outcomes[-1]

    for shape in options.shapes:
        ranks = 1 if shape == "all_experts" else RANKS
        base = Case(
            peer="ours",
            config=str(options.config.resolve()),
            batch=options.batch,
            length=options.length,
            ranks=ranks,
            calls=options.calls,
            compiled=options.compile_transformers,
            recipe=str(options.recipe.resolve()),
            overrides=tuple(options.ours),
        )
        loads = None
        if "ours" in options.only:
            outcome = once(base)
            figures += single(shape, OURS, outcome, LAYER)
            loads = tuple(outcome.result["loads"]) if outcome.result else None
        if "pytorch" in options.only:
            outcome = once(replace(base, peer="pytorch", loads=loads))
            figures += single(shape, PYTORCH, outcome, LAYER)
        if "transformers" in options.only and ranks == 1:  # it has no such form of one rank
            figures.append(_transformers(shape, base, once))
    return figures, outcomes


def _transformers(shape: str, base: Case, once: Callable[[Case], Outcome]) -> Figure:
    """The larger model uses the attention that was fastest in the smaller one."""
    without = once(replace(base, peer="transformers", moe_layers=0))
    if without.result is None:
        return difference(shape, TRANSFORMERS, without, without, WHOLE)
    attention = without.result["attention"]
    with_layer = once(replace(base, peer="transformers", moe_layers=1, attention=attention))
    return difference(shape, TRANSFORMERS, without, with_layer, WHOLE)


def show(console: object, outcome: Outcome) -> None:
    """What one process says beside its figure: versions and details, or its last words."""
    case = outcome.case
    name = f"{case.peer}, {case.ranks} rank(s)"
    if case.peer == "transformers":
        name += f", {case.moe_layers} such layer(s)"
    if outcome.result is None:
        text = f"failed: {outcome.failure}"
    else:
        hidden = ("loads", "operations")
        details = {key: value for key, value in outcome.result.items() if key not in hidden}
        text = json.dumps(details)
    console.print(  # pyright: ignore[reportAttributeAccessIssue]
        f"{name} ({outcome.seconds:.0f} s): {text}", highlight=False, markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    run_command(main)
