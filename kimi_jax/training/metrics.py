"""The record of a run, `metrics.jsonl`, and the views of it: TensorBoard and the loss curve."""

import json
from pathlib import Path
from typing import Any, Self, TextIO

from tensorboardX import SummaryWriter

from kimi_jax.errors import UserError
from kimi_jax.parallel import processes
from kimi_jax.training.run_dir import METRICS

PLOT = "loss.png"


class Metrics:
    """Writes one JSON object a line; `kind` is `step`, `eval` or `sample`, `step` counts updates made.

    Every process has one and knows what is recorded; only the first writes.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        """Goes on after `step`: later lines, of updates that were lost, are taken out of the record."""
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        recorded = processes.on_first(lambda: self._open(run_dir, step))
        self._recorded = {(kind, step) for kind, step in recorded}

    def _open(self, run_dir: Path, step: int) -> list[tuple[str, int]]:
        path = run_dir / METRICS
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        temporary = path.with_name(METRICS + ".tmp")
        temporary.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        return [(line["kind"], line["step"]) for line in kept]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()

    def has(self, kind: str, step: int) -> bool:
        """Whether the record holds such a line, from before the run was resumed."""
        return (kind, step) in self._recorded

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line and hands it to the system, so that a killed run keeps it."""
        if self._file is None or self._board is None:
            return  # not the first process
        self._file.write(_line({"kind": kind, "step": step, **values}))
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's record; a last line that was cut by a kill is left out.

    Raises:
        UserError: another line that is not one of a record.
    """
    path = run_dir / METRICS
    if not path.is_file():
        return []
    lines = []
    # By bytes: splitlines() of text would also cut at U+2028 and its like, which answers may hold.
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not text.endswith(b"\n"):
            continue
        try:
            line = json.loads(text)
            assert isinstance(line["step"], int)
            assert isinstance(line["kind"], str)
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise UserError(
                f"{path}:{number}: not a line of a run's record ({error!r}); correct or remove it"
            ) from error
        lines.append(line)
    return lines


def plot_losses(run_dir: Path) -> Path:
    """Draws training and held-out loss over steps to `loss.png` from the record."""
    # Imported here: matplotlib takes a second, and only the end of a run needs it.
    from matplotlib.figure import Figure

    lines = read_metrics(run_dir)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for kind, label, style in (("step", "training", "-"), ("eval", "held out", "o-")):
        points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats a trained token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / PLOT
    figure.savefig(path, dpi=120)
    return path


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
