"""What a merged export did: how much of each projection's intended change survived rounding."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kimi_jax.console import make_console
from kimi_jax.weights.merge import Survival

LITTLE = 0.5  # of the intended change, and for the cosine between it and the realised one
NOTHING = 1e-3
NOISE = 0.05  # cosine below which the realised change has nothing to do with the intended one


@dataclass(frozen=True)
class ProjectionReport:
    """One row of the weight table that has an adapter, all layers and experts together."""

    path: str
    changed: int  # tensors with an adapter that is not zero
    tensors: int
    survival: Survival


@dataclass(frozen=True)
class MergeReport:
    """What was written where, and what became of the adapter."""

    directory: Path
    format: str
    bytes: int
    projections: tuple[ProjectionReport, ...]
    left_out: tuple[str, ...]  # files of the source that hold weights and are in no index

    @property
    def faint(self) -> tuple[ProjectionReport, ...]:
        """Projections that kept little of their intended change."""
        return tuple(p for p in self.projections if p.changed and p.survival.fidelity < LITTLE)

    @property
    def is_lost(self) -> bool:
        """Whether changes were intended and none of them is left: what remains is the base and noise."""
        changed = [p.survival.fidelity for p in self.projections if p.changed]
        return bool(changed) and max(changed) < NOTHING

    def as_json(self) -> dict[str, Any]:
        """As values that JSON can hold; `report_of` reads them."""
        return {**asdict(self), "directory": str(self.directory)}


def report_of(values: Mapping[str, Any]) -> MergeReport:
    """The report that `MergeReport.as_json` gave, also after a way through JSON."""
    projections = tuple(
        ProjectionReport(p["path"], p["changed"], p["tensors"], Survival(*p["survival"]))
        for p in values["projections"]
    )
    return MergeReport(
        Path(values["directory"]),
        values["format"],
        values["bytes"],
        projections,
        tuple(values["left_out"]),
    )


def print_report(report: MergeReport, console: Console | None = None) -> None:
    """A table with a row per projection, and a warning where little survived."""
    console = console or make_console()
    table = Table(
        title=f"{report.format}: how much of the intended change survived rounding", box=SIMPLE
    )
    table.add_column("projection", overflow="fold")
    for heading in ("changed tensors", "survived", "cosine"):
        table.add_column(heading, justify="right")
    for p in report.projections:
        numbers = ("–", "–")
        if p.changed:
            # Under much noise the projection is a matter of chance, and often far from 0.
            survived = "noise" if p.survival.cosine < NOISE else f"{p.survival.projection:.1%}"
            numbers = (survived, f"{p.survival.cosine:.3f}")
        table.add_row(p.path, f"{p.changed:,} of {p.tensors:,}", *numbers)
    console.print(table)
    if report.left_out:
        console.print("Not copied, weights of another format:", ", ".join(report.left_out))
    if report.faint:
        names = ", ".join(p.path for p in report.faint)
        advice = (
            "the unmerged adapter (--format peft) or merged-bf16"
            if report.format == "merged-int4"
            else "the unmerged adapter (--format peft)"
        )
        console.print(
            f"Warning: little of the change survived rounding in {names}. "
            f"The merged model is not the one that was trained: use {advice} instead.",
            style="bold yellow",
        )
