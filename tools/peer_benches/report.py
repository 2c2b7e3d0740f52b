"""From the outcomes to figures of one layer, their ratios, and a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from tools.peer_benches.runner import Outcome

MOE_LAYERS = 60  # of K2-Thinking
OURS = "kimi_jax"
RECOMPUTED = ", layer recomputed"  # behind a route's name


@dataclass(frozen=True)
class Figure:
    """One layer, forward and backward, by one route in one shape.

    Attributes:
        shape: what the layer holds and sees; only figures of one shape are compared.
        route: whose.
        ms: milliseconds; None if there is no measurement.
        tokens: of the GPU's own, which pass the layer.
        operations: useful ones.
        peak_gib: of memory.
        peak_of: what that memory is of.
        assignments: rows of the experts here.
        skew: the largest expert's load over the mean.
        note: how it was measured, or why it was not.
    """

    shape: str
    route: str
    ms: float | None
    tokens: int
    operations: int
    peak_gib: float | None
    peak_of: str
    assignments: int
    skew: float | None
    note: str

    @property
    def tokens_per_second(self) -> float | None:
        """Through this layer alone."""
        return None if self.ms is None else 1e3 * self.tokens / self.ms

    @property
    def model_tokens_per_second(self) -> float | None:
        """If all of the model's mixture-of-experts layers were like this, and nothing else."""
        rate = self.tokens_per_second
        return None if rate is None else rate / MOE_LAYERS

    @property
    def teraflops(self) -> float | None:
        """Useful ones a second."""
        return None if self.ms is None else self.operations / self.ms / 1e9


def times_as_fast(ours: Figure, other: Figure) -> float | None:
    """The other's time for an operation over ours; with equal work, the ratio of the times."""
    if ours.ms is None or other.ms is None or not ours.operations or not other.operations:
        return None
    return (other.ms / other.operations) / (ours.ms / ours.operations)


def single(shape: str, route: str, outcome: Outcome, peak_of: str) -> list[Figure]:
    """The figures of one process that times one layer; a second one if it also recomputed the layer."""
    result, tokens = outcome.result, outcome.case.tokens
    if result is None:
        return [_failed(shape, route, tokens, outcome.failure)]
    figures = [_figure(shape, route, result["ms"], result, tokens, peak_of, result["how"])]
    if again := result.get("recomputed"):
        shown = {**result, "peak_gib": again["peak_gib"]}
        name = f"{route}{RECOMPUTED}"
        figures.append(_figure(shape, name, again["ms"], shown, tokens, peak_of, result["how"]))
    return figures


def difference(
    shape: str, route: str, without: Outcome, with_layer: Outcome, peak_of: str
) -> Figure:
    """The figure of the layer that one model has and the other has not."""
    tokens = with_layer.case.tokens
    for outcome in (without, with_layer):
        if outcome.result is None:
            return _failed(shape, route, tokens, outcome.failure)
    assert without.result is not None
    assert with_layer.result is not None
    took = with_layer.result["ms"] - without.result["ms"]
    note = f"{with_layer.result['how']}; without the layer {without.result['ms']:.1f} ms"
    return _figure(shape, route, took, with_layer.result, tokens, peak_of, note)


def make_table(figures: Sequence[Figure]) -> Table:
    """All figures, with ours as a multiple of each."""
    view = Table(
        "shape",
        "route",
        *("ms", "tokens/s", f"all {MOE_LAYERS}", "TFLOP/s", "ours is", "peak GiB"),
        *("rows", "skew"),
        box=box.SIMPLE_HEAD,
    )
    for figure in figures:
        ours = _ours(figures, figure)
        ratio = times_as_fast(ours, figure) if ours and ours is not figure else None
        memory = "–" if figure.peak_gib is None else f"{figure.peak_gib:.1f} {figure.peak_of}"
        view.add_row(
            figure.shape,
            figure.route,
            _text(figure.ms, "{:.1f}"),
            _text(figure.tokens_per_second, "{:,.0f}"),
            _text(figure.model_tokens_per_second, "{:,.0f}"),
            _text(figure.teraflops, "{:.0f}"),
            _text(ratio, "{:.2f} x"),
            memory,
            f"{figure.assignments:,}",
            _text(figure.skew, "{:.2f}"),
        )
    return view


def as_json(figures: Sequence[Figure], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything, for a file."""
    rows = []
    for figure in figures:
        ours = _ours(figures, figure)
        rows.append(
            {
                **asdict(figure),
                "tokens_per_second": figure.tokens_per_second,
                "model_tokens_per_second": figure.model_tokens_per_second,
                "teraflops": figure.teraflops,
                "ours_is_times_as_fast": times_as_fast(ours, figure) if ours else None,
            }
        )
    return {"figures": rows, "measurements": [asdict(outcome) for outcome in outcomes]}


def _ours(figures: Sequence[Figure], other: Figure) -> Figure | None:
    """What a figure is compared with: the same shape, and as it recomputes the layer or does not."""
    route = OURS + RECOMPUTED * other.route.endswith(RECOMPUTED)
    found = [f for f in figures if f.shape == other.shape and f.route in (route, OURS)]
    return max(found, key=lambda figure: figure.route == route, default=None)


def _figure(
    shape: str,
    route: str,
    ms: float,
    result: dict[str, Any],
    tokens: int,
    peak_of: str,
    note: str,
) -> Figure:
    loads = result["loads"]
    skew = max(loads) * len(loads) / sum(loads) if loads else None
    return Figure(
        shape,
        route,
        ms,
        tokens,
        result["operations"],
        result["peak_gib"],
        peak_of,
        result["assignments"],
        skew,
        note,
    )


def _failed(shape: str, route: str, tokens: int, failure: str) -> Figure:
    lines = failure.splitlines()
    note = f"failed, {lines[0]}: {lines[-1]}" if len(lines) > 1 else f"failed, {failure}"
    return Figure(shape, route, None, tokens, 0, None, "", 0, None, note)


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
