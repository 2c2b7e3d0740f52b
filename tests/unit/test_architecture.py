"""The shape of the package: which part may know which, how long files are, what importing does."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_jax.axes import AXES
from tests.unit import golden

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kimi_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports point from a later line to an earlier one, or stay on their line.
LEVELS = [
    {"errors", "axes", "config", "config_file", "console", "memory_settings"},
    {"int4"},
    {"kernels"},
    {"parallel"},
    {"model", "lora"},
    {"weights", "data"},
    {"planning"},
    {"training"},
    {"command", "train", "export", "generate", "plan", "inspect", "__init__"},
]
LEVEL_OF = {part: number for number, parts in enumerate(LEVELS) for part in parts}

FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES = 300, 500, 80
ABSOLUTE = re.compile(r"(^|[\s'\"=:(])/(home|root|Users|work|tmp|mnt|opt|srv|data|scratch)/")


def relative(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """`weights` for kimi_jax/weights/names.py, `lora` for kimi_jax/lora.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), relative(path))


def imported_modules(path):
    """Full names of everything imported in a file, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            # `from kimi_jax import lora` names a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_part_has_a_level():
    """A new module must be placed in LEVELS before anything can import it."""
    assert {part_of(path) for path in FILES} - LEVEL_OF.keys() == set()


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        importer = part_of(path)
        for name in imported_modules(path):
            parts = name.split(".")
            if parts[0] != "kimi_jax":
                continue
            imported = parts[1] if parts[1] in LEVEL_OF else "__init__"
            if LEVEL_OF[imported] > LEVEL_OF[importer]:
                wrong.append(f"{relative(path)} imports {name}")
    assert wrong == []


def test_commands_do_not_import_each_other():
    """`command` is what they share."""
    commands = LEVELS[-1] - {"command", "__init__"}
    for path in FILES:
        if part_of(path) in commands:
            others = {f"kimi_jax.{command}" for command in commands}
            assert not {".".join(n.split(".")[:2]) for n in imported_modules(path)} & others


@pytest.mark.parametrize("banned", ["jax._src", "jax.interpreters", "torch", "peft", "vllm"])
def test_banned_imports(banned):
    for path in FILES:
        for name in imported_modules(path):
            assert not f"{name}.".startswith(f"{banned}."), relative(path)
        assert "jax._src" not in path.read_text(encoding="utf-8"), relative(path)


def test_sizes_of_files():
    long = []
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (KERNEL_FILE_LINES if part_of(path) == "kernels" else FILE_LINES):
            long.append(f"{relative(path)}: {lines} lines")
    assert long == []


def test_sizes_of_functions():
    long = [
        f"{relative(path)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert long == []


def test_no_absolute_paths():
    """The machine that something was written on is nobody's business."""
    texts = [*FILES, *ROOT.glob("tools/**/*.py"), *ROOT.glob("configs/*"), *ROOT.glob("*.md")]
    found = [
        f"{relative(path)}:{number}"
        for path in texts
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ABSOLUTE.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_letters_of_the_weight_table_are_axes(name):
    for weight in golden.checkpoint(name).table:
        letters = re.findall(r"[A-Za-z]", weight.axes)
        assert letters
        assert len(weight.axes.split()) == len(weight.shape)
        for letter in letters:
            assert AXES[letter].config_field is not None, (weight.path, letter)


def test_axes_name_fields_of_the_configuration():
    config = golden.checkpoint("k2_thinking").config
    for letter, axis in AXES.items():
        assert len(letter) == 1
        assert axis.config_field is None or hasattr(config, axis.config_field), letter


def statements_at_import(node):
    """What runs when a module is imported: everything but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
            yield from statements_at_import(child)


def test_importing_leaves_the_environment_alone():
    # Not seen by comparing os.environ: libraries that are imported along the way write into it.
    for path in FILES:
        for node in statements_at_import(tree(path)):
            name = getattr(node, "attr", getattr(node, "id", None))
            assert name not in ("environ", "getenv", "putenv"), f"{relative(path)}:{node.lineno}"


IMPORT_EVERYTHING = """
import importlib, json, os, pkgutil, sys, threading
import jax, flax.nnx, optax, orbax.checkpoint, grain, transformers, matplotlib, rich, yaml, pydantic
before = set(threading.enumerate())
import kimi_jax
names = [m.name for m in pkgutil.walk_packages(kimi_jax.__path__, "kimi_jax.")]
for name in names:
    importlib.import_module(name)
from jax._src import xla_bridge
print(json.dumps({
    "modules": names,
    "backends": sorted(xla_bridge._backends),
    "threads": [str(t) for t in set(threading.enumerate()) - before],
    "files": sorted(os.listdir(".")),
    "torch": "torch" in sys.modules,
}))
"""


def test_importing_does_no_work(tmp_path):
    """No device, file or thread is touched by importing every module."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(result.stdout)
    assert {f"kimi_jax.{part}" for part in LEVEL_OF if (PACKAGE / f"{part}.py").exists()} - {
        "kimi_jax.__init__"
    } <= set(found.pop("modules"))
    assert found == {
        "backends": [],
        "threads": [],
        "files": [],
        "torch": False,
    }
