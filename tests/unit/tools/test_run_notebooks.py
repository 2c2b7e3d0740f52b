"""`tools/run_notebooks.py`: what counts as rendered, and what as an empty figure; the committed notebooks."""

import ast
import base64
import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from kimi_jax.model.config import load_model_config, parse_model_config

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load("run_notebooks")


@pytest.fixture(scope="module")
def figures():
    return load("notebook_figures")


def png(draw=True):
    figure = Figure(figsize=(1, 1))
    if draw:
        figure.subplots().plot([0, 1])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def code(source="1", outputs=()):
    return {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "source": source,
        "outputs": list(outputs),
        "execution_count": 1,
    }


def picture(data):
    return {"output_type": "display_data", "data": {"image/png": data}, "metadata": {}}


def notebook(tool, *cells, pictures=1):
    """A rendered notebook: a cell with a picture, and the given ones."""
    made = {
        "cells": [code("draw", [picture(png())]), *cells],
        "metadata": {"kimi_jax": {"pictures": pictures}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return tool.as_committed(made)


def test_a_rendered_notebook_has_no_problems(tool):
    empty_cell = {**code(""), "execution_count": None}
    words = {"cell_type": "markdown", "id": "b", "metadata": {}, "source": "words"}
    assert tool.problems_of(notebook(tool, words, empty_cell)) == []


def test_what_is_not_rendered_is_told(tool):
    """Guards each of the reasons for which CI refuses a notebook."""
    unexecuted = {**code(), "execution_count": None}
    assert tool.problems_of(notebook(tool, unexecuted)) == ["code cell 2 was not executed"]
    error = {"output_type": "error", "ename": "ValueError", "evalue": "bad", "traceback": []}
    assert tool.problems_of(notebook(tool, code("x", [error]))) == ["code cell 2: ValueError: bad"]
    assert tool.problems_of(notebook(tool, pictures=2)) == ["1 pictures, where its metadata says 2"]
    blank = notebook(tool, code("y", [picture(png(draw=False))]), pictures=2)
    assert tool.problems_of(blank) == ["picture 2 is blank"]
    edited = notebook(tool)
    edited["cells"][0]["source"] = ["other"]
    (problem,) = tool.problems_of(edited)
    assert "changed since it was rendered" in problem
    silent = notebook(tool)
    del silent["metadata"]["kimi_jax"]["pictures"]
    (problem,) = tool.problems_of(silent)
    assert "is missing" in problem


@pytest.mark.parametrize(
    ("draw", "drawn"),
    [
        (lambda axes: None, False),
        (lambda axes: axes.set_title("a title, labels and a legend are not enough"), False),
        (lambda axes: axes.plot([], []), False),
        (lambda axes: axes.plot([0, 1], [np.nan, np.nan]), False),
        (lambda axes: axes.bar([0, 1], [0, 0]), False),
        (lambda axes: axes.scatter([], []), False),
        (lambda axes: axes.imshow(np.full((2, 2), np.nan)), False),
        (lambda axes: axes.plot([0, 1], [np.nan, 1]), True),
        (lambda axes: axes.barh([0, 1], [0, 2]), True),
        (lambda axes: axes.scatter([0], [0]), True),
        (lambda axes: axes.imshow([[0, 1]]), True),
        (lambda axes: axes.fill_between([0, 1], [1, 2]), True),
        (lambda axes: axes.hist([1, 2, 2]), True),
    ],
)
def test_empty_axes_are_found(figures, draw, drawn):
    """Guards a figure with axes, ticks and labels, and nothing in them."""
    figure = Figure()
    full, other = figure.subplots(1, 2)
    full.plot([0, 1])
    draw(other)
    found = figures.empty_parts(figure)
    assert (found == []) == drawn
    if not drawn:
        assert "nothing is drawn in axes 2 of 2" in found[0]


def test_a_colour_bar_is_drawn(figures):
    figure = Figure()
    axes = figure.subplots()
    figure.colorbar(axes.imshow([[0, 1]]), ax=axes)
    assert figures.empty_parts(figure) == []
    assert figures.empty_parts(Figure()) == ["a figure without axes"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_rendered(tool, path):
    """Guards a notebook that was edited and not executed; `--write` executes it."""
    assert tool.problems_of(json.loads(path.read_text(encoding="utf-8"))) == []
    assert path.stat().st_size <= tool.LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_public_names_only(tool, path):
    """A notebook that needs a private name shows that the public interface is short of something."""
    for cell in tool.code_cells(json.loads(path.read_text(encoding="utf-8"))):
        magic = re.compile(r"^( *)%.*$", re.MULTILINE)
        tree = ast.parse(magic.sub(r"\1pass", "".join(cell["source"])))
        for node in ast.walk(tree):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names += [getattr(node, "attr", "")]
            private = [n for n in names if n.startswith("_") and not n.startswith("__")]
            assert private == [], private


def test_the_planned_model_is_k2_thinking(tool):
    """Guards numbers of the notebook that differ from those of configs/k2_thinking."""
    path = ROOT / "notebooks" / "04_plan_a_trillion.ipynb"
    sources = [
        "".join(cell["source"])
        for cell in tool.code_cells(json.loads(path.read_text(encoding="utf-8")))
    ]
    (source,) = [text for text in sources if text.startswith("K2_THINKING = ")]
    written = ast.parse(source).body[0]
    found = parse_model_config(ast.literal_eval(written.value))
    assert found == load_model_config(ROOT / "configs" / "k2_thinking")


def test_errors_and_empty_figures_end_a_run(tool):
    """Guards an execution that ends well whatever happens in it. Needs the `notebooks` extra."""
    pytest.importorskip("nbclient")
    empty = "import matplotlib.pyplot as plt\nplt.subplots()[1].set_title('nothing')\nplt.show()"
    made = notebook(tool, code("1 + 1"), code(empty), code("1 / 0"), code("3"))
    made["cells"][0]["source"] = "0"
    for number, cell in enumerate(made["cells"]):
        cell["id"] = f"cell-{number}"
    executed, found = tool.execute(made)
    assert any("ZeroDivisionError" in line for line in found)
    assert executed["cells"][1]["outputs"][0]["data"]["text/plain"] == ["2"]
    assert executed["cells"][4]["execution_count"] is None
    del made["cells"][3]
    executed, found = tool.execute(made)
    assert found == ["nothing is drawn in axes 1 of 1, 'nothing'"]
    assert tool.problems_of(executed) == []
