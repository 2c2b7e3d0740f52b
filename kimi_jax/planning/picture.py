"""The memory of a run as a picture: one bar a device, cut into what it holds."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kimi_jax.errors import UserError
from kimi_jax.planning.memory import MemoryPlan

GIB = 2**30
# Shades of one colour for each kind of item.
SHADES = {
    "weights": ("#1f4e79", "#2e75b6", "#7fb2dd", "#bdd7ee"),
    "training": ("#375623", "#548235", "#a9d08e", "#c6e0b4"),
    "activations": ("#c55a11", "#f4b183"),
    "reserve": ("#bfbfbf",),
}
NARROW = 0.02  # of the device's memory: narrower parts are named in the legend alone
MOST_BARS = 8


def save(plan: MemoryPlan, path: Path) -> None:
    """Writes the picture; the file's ending says how (`.png`, `.pdf`, `.svg`).

    Raises:
        UserError: an ending that means no kind of picture, or a file that cannot be written.
    """
    figure = draw(plan)
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise UserError(f"{path}: its ending must be one of {', '.join(sorted(kinds))}")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def draw(plan: MemoryPlan) -> Figure:
    """A horizontal bar for each device of a node, the first with its numbers."""
    bars = min(plan.devices, MOST_BARS)
    figure = Figure(figsize=(11, 2.6 + 0.32 * bars), layout="constrained")
    axes = figure.subplots()
    left, used = 0.0, dict.fromkeys(SHADES, 0)
    for item in plan.items:
        if not item.bytes:
            continue
        shades = SHADES[item.kind]
        colour = shades[used[item.kind] % len(shades)]
        used[item.kind] += 1
        size = item.bytes / GIB
        axes.barh(
            range(bars), size, left=left, height=0.8, color=colour, edgecolor="white",
            linewidth=0.6, label=f"{item.name}: {size:,.3g} GiB",
        )  # fmt: skip
        if item.bytes > NARROW * max(plan.capacity, plan.total):
            axes.text(
                left + size / 2,
                0,
                f"{size:,.0f}",
                ha="center",
                va="center",
                size=8,
                color=_text_on(colour),
            )
        left += size
    _label(axes, plan, bars)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _label(axes: Axes, plan: MemoryPlan, bars: int) -> None:
    capacity = plan.capacity / GIB
    axes.axvline(capacity, color="black", linewidth=1.2, linestyle="--")
    axes.set_yticks(range(bars), [f"device {number}" for number in range(bars)], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.04 * max(capacity, plan.total / GIB))
    axes.set_xlabel("GiB")
    verdict = "fits" if plan.fits else "does not fit"
    axes.set_title(
        f"{plan.devices} × {plan.device}, {plan.tokens_per_device:,} tokens a device: "
        f"{plan.total / GIB:,.1f} of {capacity:,.1f} GiB, {verdict}",
        fontsize=10,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _text_on(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 140 else "black"
