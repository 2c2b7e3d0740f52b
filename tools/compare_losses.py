"""Compares the losses of two runs, step by step.

    python tools/compare_losses.py A B [--tolerance X]
    python tools/compare_losses.py RUN --write tests/golden/losses/NAME.jsonl

A and B are run directories, their metrics.jsonl, or golden files. Training and held-out losses are
compared where both stand in the record of the same step; a step that only one has is a difference.
Exit code 0: all within the tolerance (by default, equal); 1: not; 2: not comparable.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from kimi_jax.command import run_command
from kimi_jax.console import make_console
from kimi_jax.errors import MissingFileError, UserError, listing

METRICS = "metrics.jsonl"
KINDS = ("step", "eval")

Key = tuple[str, int]  # kind and step
Losses = Mapping[Key, float]


@dataclass(frozen=True)
class Comparison:
    """The lines that differ beyond the tolerance, in order, and the largest difference of all."""

    differing: list[tuple[Key, float | None, float | None]]
    compared: int
    largest: float
    largest_at: Key | None


def read_losses(name: str | Path) -> dict[Key, float]:
    """The losses of a run directory, a metrics file or a golden, by kind and step.

    Raises:
        MissingFileError: no such file.
        UserError: lines that are not a record's, a step that stands twice, or no loss at all.
    """
    path = Path(name)
    if path.is_dir():
        path /= METRICS
    if not path.is_file():
        raise MissingFileError(f"{path}: not found; give a run directory, a {METRICS} or a golden")
    losses: dict[Key, float] = {}
    problems = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            kind, step = line["kind"], line["step"]
            if kind not in KINDS:
                continue
            key, loss = (kind, int(step)), float(line["loss"])
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"line {number}: not a line of a record: {error!r}")
            continue
        if key in losses:
            problems.append(f"line {number}: {kind} {step} stands twice")
        losses[key] = loss
    if not losses and not problems:
        problems.append("no line of kind step or eval")
    if problems:
        raise UserError(listing(f"{path}: losses cannot be read", problems))
    return losses


def compare(a: Losses, b: Losses, tolerance: float) -> Comparison:
    """Losses that differ by more than `tolerance` (nats), or that only one side has."""
    differing: list[tuple[Key, float | None, float | None]] = []
    largest, largest_at = 0.0, None
    for key in sorted(a.keys() | b.keys(), key=lambda key: (key[1], KINDS.index(key[0]))):
        one, other = a.get(key), b.get(key)
        if one is None or other is None:
            differing.append((key, one, other))
            continue
        # Two losses that are both not a number, or the same infinity, are the same outcome.
        same = one == other or (one != one and other != other)
        difference = 0.0 if same else abs(one - other)
        if not difference <= tolerance:
            differing.append((key, one, other))
        if not difference <= largest:
            largest, largest_at = difference, key
    return Comparison(differing, len(a.keys() & b.keys()), largest, largest_at)


def write_golden(path: Path, losses: Losses) -> None:
    """Writes a golden: one line a loss, in the order of the record, with all its digits."""
    lines = [
        json.dumps({"kind": kind, "step": step, "loss": loss})
        for (kind, step), loss in losses.items()
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and compares, or writes a golden."""
    parser = argparse.ArgumentParser(
        prog="python tools/compare_losses.py",
        description="Compares the losses of two runs step by step. Exit code 1 if they differ.",
    )
    parser.add_argument("a", metavar="A", help=f"run directory, {METRICS} or golden")
    parser.add_argument("b", metavar="B", nargs="?", help="what A is compared with")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest absolute difference in nats that counts as equal; by default none does",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="writes A's losses as a golden")
    options = parser.parse_args(arguments)
    if (options.b is None) == (options.write is None):
        parser.error("give B to compare with, or --write, one of the two")
    if not options.tolerance >= 0:
        parser.error(f"--tolerance is {options.tolerance}; required: 0 or more")
    if options.write is not None:
        write_golden(options.write, read_losses(options.a))
        return
    comparison = compare(read_losses(options.a), read_losses(options.b), options.tolerance)
    _show(comparison, options.a, options.b, options.tolerance)
    if comparison.differing:
        sys.exit(1)


def _show(comparison: Comparison, a: str, b: str, tolerance: float) -> None:
    console = make_console()
    if comparison.differing:
        view = Table("line", "A", "B", "difference", box=box.SIMPLE_HEAD)
        for (kind, step), one, other in comparison.differing:
            difference = "–" if one is None or other is None else f"{abs(one - other):.3g}"
            view.add_row(f"{kind} {step}", _text(one), _text(other), difference)
        console.print(view)
    where = f", at {' '.join(map(str, comparison.largest_at))}" if comparison.largest_at else ""
    console.print(
        f"{comparison.compared} losses in both of A, {a}, and B, {b}; largest difference "
        f"{comparison.largest:.3g}{where}; {len(comparison.differing)} beyond the tolerance of "
        f"{tolerance:g} or in one only.",
        highlight=False,
        soft_wrap=True,
    )


def _text(loss: float | None) -> str:
    return "missing" if loss is None else repr(loss)


if __name__ == "__main__":
    run_command(main)
