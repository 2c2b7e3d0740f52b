"""Executes the notebooks: python tools/run_notebooks.py [--write] [NOTEBOOK …]

Needs the `notebooks` extra. Without --write, first what is committed must be rendered: every cell was
executed as it stands now, without an error, and the pictures are there; then each notebook runs from
top to bottom, in a kernel and a folder of its own. An error, a picture that is missing or a figure with
nothing drawn in it ends with 1. With --write the notebooks are run and saved with their outputs.

A notebook says in its metadata how many pictures it has: "kimi_jax": {"pictures": 3}.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
LARGEST = 400_000  # bytes of a notebook with its outputs
CELL_SECONDS = 600
SURROUNDINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=1",  # most of the time is compiling
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # progress bars that no notebook here shows
}
WATCH = f"""
import sys
sys.path.append({str(ROOT / "tools")!r})
import notebook_figures
notebook_figures.watch()
"""
FOUND = "print('\\n'.join(notebook_figures.found))"

Notebook = dict[str, Any]  # as nbformat's JSON


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the named notebooks, or all, and ends with 1 and a list of what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--write", action="store_true", help="save them with their outputs")
    options = parser.parse_args(arguments)
    paths = options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    problems = [] if paths else [f"{NOTEBOOKS}: no notebooks"]
    for path in paths:
        committed = json.loads(path.read_text(encoding="utf-8"))
        if not options.write:
            problems += [f"{path.name}, as committed: {p}" for p in problems_of(committed)]
        began = time.perf_counter()
        executed, found = execute(committed)
        seconds = time.perf_counter() - began
        problems += [f"{path.name}: {p}" for p in (*found, *problems_of(executed))]
        count = len(list(pictures(executed)))
        print(f"{path.name}: {seconds:.0f} s, {count} pictures", flush=True)
        if options.write:
            text = json.dumps(executed, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            path.write_text(text, encoding="utf-8")
        if (size := path.stat().st_size) > LARGEST:
            problems.append(f"{path.name}: {size:,} bytes; at most {LARGEST:,}: draw smaller")
    if problems:
        raise SystemExit("\n".join(problems))


def problems_of(notebook: Notebook) -> list[str]:
    """What keeps a notebook from being a rendered one: a line each."""
    problems = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        if cell["execution_count"] is None:
            problems.append(f"code cell {number} was not executed")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                problems.append(f"code cell {number}: {output['ename']}: {output['evalue']}")
    ours = notebook["metadata"].get("kimi_jax", {})
    if ours.get("rendered_from") != digest(notebook):
        problems.append("its cells were changed since it was rendered (--write renders it)")
    shown = list(pictures(notebook))
    expected = ours.get("pictures")
    if not isinstance(expected, int) or expected < 1:
        problems.append('metadata "kimi_jax": {"pictures": N} is missing')
    elif len(shown) != expected:
        problems.append(f"{len(shown)} pictures, where its metadata says {expected}")
    problems += [f"picture {n} is blank" for n, png in enumerate(shown, start=1) if is_blank(png)]
    return problems


def code_cells(notebook: Notebook) -> list[Notebook]:
    """Cells of code that hold something, in order."""
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"])]


def pictures(notebook: Notebook) -> Iterator[bytes]:
    """The PNG outputs, in order."""
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            png = output.get("data", {}).get("image/png")
            if png is not None:
                yield base64.b64decode("".join(png))


def is_blank(png: bytes) -> bool:
    """Whether all pixels have one colour."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(png), format="png")
    return bool((pixels == pixels[0, 0]).all())


def digest(notebook: Notebook) -> str:
    """Identifies the code of a notebook."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def execute(committed: Notebook) -> tuple[Notebook, list[str]]:
    """Runs a notebook in a fresh kernel; returns it with its outputs, and what was found wrong in it.

    Execution ends with the first error, which stands in the outputs of its cell.
    """
    # Imported here: what is committed can be checked without them.
    import nbformat  # pyright: ignore[reportMissingImports]
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]
    from nbclient.exceptions import CellExecutionError  # pyright: ignore[reportMissingImports]
    from traitlets.config import Config  # pyright: ignore[reportMissingImports]

    notebook: Any = nbformat.reads(json.dumps(committed), as_version=4)
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    found: list[str] = []
    watch, report = (nbformat.v4.new_code_cell(text) for text in (WATCH, FOUND))
    cells = notebook["cells"]
    notebook["cells"] = [watch, *cells, report]
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}}),
        )
        with client.setup_kernel(env={**os.environ, **SURROUNDINGS}, cwd=folder):
            try:
                for index, cell in enumerate(notebook["cells"]):
                    client.execute_cell(cell, index, store_history=cell in cells)
            except CellExecutionError as error:
                found.append(str(error))
    found += "".join(output.get("text", "") for output in report["outputs"]).split("\n")
    notebook["cells"] = cells
    return as_committed(notebook), [line for line in found if line]


def as_committed(notebook: Notebook) -> Notebook:
    """The notebook as plain JSON, with the digest of its code, without the machine's particulars."""
    plain = json.loads(json.dumps(notebook))
    ours = plain["metadata"].get("kimi_jax", {})
    plain["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "kimi_jax": {**ours, "rendered_from": digest(plain)},
    }
    for cell in plain["cells"]:
        cell["metadata"] = {}
        cell["source"] = _lines(cell["source"])
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = _lines(output["text"])
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output["data"][kind] = _lines(value)
    return plain


def _lines(text: str | list[str]) -> list[str]:
    """Text as notebooks store it, so that a difference shows the line."""
    return "".join(text).splitlines(keepends=True)


if __name__ == "__main__":
    main(sys.argv[1:])
