"""Whether a figure shows anything: used inside a notebook's kernel by tools/run_notebooks.py."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

found: list[str] = []  # of the figures rendered since `watch`
rendered: list[int] = []  # numbers of axes in each


def watch() -> None:
    """From now on every figure is looked at when it is rendered."""
    original = FigureCanvasBase.print_figure

    def print_figure(canvas: FigureCanvasBase, *args: Any, **kwargs: Any) -> Any:
        rendered.append(len(canvas.figure.axes))
        found.extend(empty_parts(canvas.figure))
        return original(canvas, *args, **kwargs)

    setattr(FigureCanvasBase, "print_figure", print_figure)  # noqa: B010 (its type is another)


def empty_parts(figure: Figure) -> list[str]:
    """A line for each visible part of the figure in which nothing is drawn."""
    axes = [part for part in figure.axes if part.get_visible()]
    if not axes:
        return ["a figure without axes"]
    return [
        f"nothing is drawn in axes {number} of {len(axes)}, {_name(part)}"
        for number, part in enumerate(axes, start=1)
        if not is_drawn(part)
    ]


def is_drawn(axes: Axes) -> bool:
    """Whether a line, picture, bar or patch of some extent, or a collection of something, is there."""
    lines = any(_finite_points(line) for line in axes.lines)
    images = any(_finite(image.get_array()) for image in axes.images)
    patches = any(_extent(patch) > 0 for patch in axes.patches)
    collections = any(
        len(collection.get_paths()) > 0
        and (np.size(collection.get_offsets()) > 0 or _finite(collection.get_array()))
        for collection in axes.collections
    )
    return bool(lines or images or patches or collections)


def _finite_points(line: Any) -> bool:
    return bool(np.isfinite(line.get_xydata()).all(axis=1).any())


def _finite(values: Any) -> bool:
    return values is not None and bool(np.isfinite(np.ma.getdata(values)).any())


def _extent(patch: Any) -> float:
    """Area of the patch's box in its own coordinates."""
    box = patch.get_path().get_extents(patch.get_patch_transform())
    return abs(box.width * box.height)


def _name(axes: Axes) -> str:
    return repr(axes.get_title() or axes.get_ylabel() or axes.get_xlabel() or "without a title")
