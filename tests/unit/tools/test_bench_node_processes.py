"""The processes of `tools/bench_node.py`: what fails, crashes or hangs takes nothing else along."""

import json
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from kimi_jax.errors import UserError
from tools import bench_node
from tools.node_bench.ahead import environment
from tools.node_bench.record import SICK, Record, Skipped, run_sections
from tools.node_bench.runner import Runner
from tools.node_bench.tables import headline
from tools.step_bench.machine import seconds_since_start

QUIET = Console(quiet=True)


def test_sections_that_fail_let_the_others_run(tmp_path):
    record = Record(tmp_path / "found.json")

    def failing(found):
        found["half"] = 1
        raise ValueError("no good\nmore of it")

    def skipped(found):
        raise Skipped("too small")

    functions = {"a": failing, "b": skipped, "c": lambda found: found.update(whole=2)}
    assert run_sections(["a", "b", "c"], functions, record, QUIET) == 0
    found = json.loads(record.path.read_text())["sections"]
    assert {name: one["state"] for name, one in found.items()} == {
        "a": "failed",
        "b": "skipped",
        "c": "done",
    }
    assert (found["a"]["half"], found["a"]["error"]) == (1, "ValueError: no good")
    assert "failing" in found["a"]["traceback"]
    assert headline("a", found["a"]) == "ValueError: no good"


def test_what_is_refused_is_said_without_a_traceback(tmp_path, capsys):
    record = Record(tmp_path / "found.json")

    def refused(found):
        raise UserError("The run cannot fit\n  - scales: 7 GiB")

    assert run_sections(["a"], {"a": refused}, record, QUIET) == 0
    assert capsys.readouterr().out == "The run cannot fit\n  - scales: 7 GiB\n"
    assert record.sections["a"]["state"] == "failed"


def test_a_sick_device_gets_a_new_process(tmp_path):
    record = Record(tmp_path / "found.json")

    def dead(found):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    def full(found):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    functions = {"full": full, "dead": dead, "never": lambda found: None}
    assert run_sections(["full", "dead", "never"], functions, record, QUIET) == SICK
    assert "never" not in record.sections
    assert run_sections(["dead"], functions, record, QUIET) == 0  # nothing is left to do


# Workers without JAX, which do to the record what real ones do.
WORKER = """
import json, sys, time
path, how, names = sys.argv[1], sys.argv[2], sys.argv[3:]
def note(name, state):
    values = json.load(open(path))
    values["sections"][name]["state"] = state
    json.dump(values, open(path, "w"))
note(names[0], "running")
if how == "hang":
    time.sleep(60)
if how == "crash":
    sys.exit(9)
for name in names:
    note(name, "done")
    if how == "sick":
        sys.exit(75)
"""


class Node:
    """Starts such workers, each behaving as is said for its first section."""

    def __init__(self, path, **how):
        self.path, self.how, self.started = path, how, []

    def __call__(self, names):
        self.started.append(list(names))
        how = self.how.get(names[0], "well")
        code = "pass" if how == "nothing" or names in (["write"], ["compile"]) else WORKER
        command = [sys.executable, "-c", code, str(self.path), how, *names]
        return subprocess.Popen(command)


def run_all(tmp_path, sections, seconds=60.0, prepare=(), **how):
    path = tmp_path / "found.json"
    node, record = Node(path, **how), Record(path)
    limit = seconds_since_start() + seconds
    Runner(node, limit, record, QUIET).run(sections, prepare)
    return node.started, {name: found["state"] for name, found in record.sections.items()}


def test_a_crash_ends_one_section(tmp_path):
    started, states = run_all(tmp_path, ["step", "decode", "import"], step="crash")
    assert started == [["step", "decode"], ["decode"], ["import"]]
    assert states == {"step": "failed", "decode": "done", "import": "done"}


def test_sections_behind_a_sick_one_are_done_by_another_process(tmp_path):
    started, states = run_all(tmp_path, ["step", "decode"], step="sick")
    assert started == [["step", "decode"], ["decode"]]
    assert states == {"step": "done", "decode": "done"}


def test_a_worker_that_never_begins_is_not_started_forever(tmp_path):
    started, states = run_all(tmp_path, ["step", "decode"], step="nothing")
    assert started == [["step", "decode"]]
    assert states == {"step": "failed", "decode": "failed"}


def test_at_the_limit_what_runs_is_stopped(tmp_path):
    started, states = run_all(
        tmp_path, ["rank", "step", "decode", "import"], seconds=1.5, step="hang"
    )
    assert started == [["rank"], ["step", "decode"]]
    assert states == {
        "rank": "done",
        "step": "stopped",
        "decode": "not run",
        "import": "not run",
    }


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        (["rank", "step", "import"], ["compile", "write", "rank", "step", "import"]),
        (["step", "import"], ["step", "write", "import"]),
        (["rank", "step"], ["compile", "rank", "step"]),
        (["rank", "import"], ["write", "rank", "import"]),
    ],
)
def test_what_is_prepared_while_a_rank_compiles(tmp_path, sections, wanted):
    started, _ = run_all(tmp_path, sections, prepare=["write", "compile"])
    assert [",".join(names) for names in started] == wanted


@pytest.mark.parametrize(("visible", "wanted"), [(None, "1,2,3,0"), ("4,6,7,5", "6,7,5,4")])
def test_what_compiles_beside_a_rank_leaves_its_gpu_alone(monkeypatch, visible, wanted):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    changes = environment(4)
    assert changes["CUDA_VISIBLE_DEVICES"] == wanted
    assert changes["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_compiling_ahead_wants_a_cache(monkeypatch, capsys):
    """Without one the work would be for nothing."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with pytest.raises(SystemExit) as ending:
        bench_node.arguments(["--config", "run.yaml", "--compile-ahead"])
    assert ending.value.code == 2
    assert "JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().err
