"""`tools/bench_peers.py`: its command line, the table's arithmetic, and what a failing process does to it.

No GPU, torch or transformers: processes are replaced by their results.
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_jax.command import run_command

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_peers", ROOT / "tools" / "bench_peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def modules(tool):
    from tools.peer_benches import case, report, runner

    return case, report, runner


OPERATIONS = 16 * 10**12
TIMES = {"ours": 25.0, "pytorch": 50.0}


def fake_result(case):
    """What a process would write; the layer of transformers' model takes 200 - 100 ms."""
    took = TIMES.get(case.peer, 100.0 * (1 + case.moe_layers))
    result = {
        "ms": took,
        "peak_gib": 10.0,
        "operations": OPERATIONS,
        "loads": [3, 1],
        "assignments": 4,
        "how": "somehow",
    }
    if case.peer == "transformers":
        result["attention"] = "the fastest"
    if case.peer != "transformers":
        result["recomputed"] = {"ms": 3 * TIMES[case.peer] / 2, "peak_gib": 8.0}
    return result


def fake_run(runner, fails=()):
    def run(case, limit_s):
        run.cases.append(case)
        if case.peer in fails:
            return runner.Outcome(case, None, "exit code 1\nlast words", 1.0)
        return runner.Outcome(case, fake_result(case), "", 1.0)

    run.cases = []
    return run


def test_ratios_compare_within_a_shape(tool, modules):
    """A wrong reference, or a difference taken the wrong way round, would flatter."""
    _, report, runner = modules
    run = fake_run(runner)
    figures, _ = tool.measure_all(tool.parse([]), run)
    ours = figures[0]
    named = {(f.shape, f.route): f for f in figures}
    assert report.times_as_fast(ours, named["all_experts", tool.PYTORCH]) == 2
    assert report.times_as_fast(ours, named["all_experts", tool.TRANSFORMERS]) == 4
    recomputed = report.RECOMPUTED
    assert named["all_experts", tool.OURS + recomputed].ms == 37.5
    ratios = {
        (row["shape"], row["route"]): row["ours_is_times_as_fast"]
        for row in report.as_json(figures, [])["figures"]
    }
    # What recomputes its layer is compared with ours that does.
    assert ratios["one_rank", tool.PYTORCH + recomputed] == 75.0 / 37.5
    assert ratios["one_rank", tool.PYTORCH] == 2
    assert ours.tokens_per_second == 8192 / 0.025
    assert ours.model_tokens_per_second == pytest.approx(8192 / 0.025 / 60)
    assert ours.teraflops == pytest.approx(640)
    assert ours.skew == 1.5
    assert ("one_rank", tool.TRANSFORMERS) not in named


def test_processes_and_what_they_are_told(tool, modules):
    """PyTorch gets the loads that ours had; the second model of transformers the first's attention."""
    _, _, runner = modules
    run = fake_run(runner)
    tool.measure_all(tool.parse(["--batch", "2", "--ours", "train.recompute=none"]), run)
    seen = [(c.peer, c.ranks, c.moe_layers, c.loads, c.attention) for c in run.cases]
    assert seen == [
        ("ours", 1, 1, None, None),
        ("pytorch", 1, 1, (3, 1), None),
        ("transformers", 1, 0, None, None),
        ("transformers", 1, 1, None, "the fastest"),
        ("ours", 8, 1, None, None),
        ("pytorch", 8, 1, (3, 1), None),
    ]
    assert all(c.batch == 2 and c.overrides == ("train.recompute=none",) for c in run.cases)


def test_a_case_survives_its_journey(modules):
    case, _, _ = modules
    there = case.Case("ours", "config", loads=(1, 2), overrides=("a=b",))
    assert case.Case.from_json(json.loads(json.dumps(there.to_json()))) == there


def test_a_failure_is_reported_and_the_rest_goes_on(tool, modules, monkeypatch, capsys, tmp_path):
    """Exit code 1, the last words shown, and the other figures in the table and in the file."""
    _, _, runner = modules
    monkeypatch.setattr(tool, "run_case", fake_run(runner, fails=("pytorch",)))
    monkeypatch.setattr(tool, "check_installed", lambda _: None)
    file = tmp_path / "out.json"
    with pytest.raises(SystemExit) as ending:
        run_command(tool.main, ["--json", str(file)])
    assert ending.value.code == 1
    printed = capsys.readouterr().out
    assert "last words" in printed
    assert "4.00 x" in printed
    written = json.loads(file.read_text())
    failed = [f["route"] for f in written["figures"] if f["ms"] is None]
    assert failed == [tool.PYTORCH] * 2
    assert len(written["measurements"]) == 6


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('why'); sys.exit(3)", "exit code 3\nwhy"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("import time; time.sleep(60)", "stopped after"),
    ],
)
def test_ways_to_fail(modules, code, said):
    case, _, runner = modules
    limit = 1 if "sleep" in code else 60
    outcome = runner.run_case(case.Case("ours", ""), limit, (sys.executable, "-c", code))
    assert outcome.result is None
    assert outcome.failure.startswith(said)


def test_a_result_comes_back(modules):
    case, _, runner = modules
    code = "import sys; open(sys.argv[2], 'w').write('{\"ms\": 1}')"
    outcome = runner.run_case(case.Case("ours", ""), 60, (sys.executable, "-c", code))
    assert (outcome.result, outcome.failure) == ({"ms": 1}, "")


def test_missing_packages_are_a_users_mistake(tool, monkeypatch, capsys):
    """Named, and exit code 2: a peer is never left out in silence."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tool.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    with pytest.raises(SystemExit) as ending:
        run_command(tool.main, ["--only", "pytorch"])
    assert ending.value.code == 2
    assert "torch, which pytorch needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--batch", "0"], ["--only", "nobody"], ["--recipe", "none.yaml"]]
)
def test_bad_arguments(tool, wrong):
    with pytest.raises(SystemExit) as ending:
        tool.parse(wrong)
    assert ending.value.code == 2


def test_operations_are_those_of_the_weight_table(modules):
    """Four a parameter that a token is multiplied by, as the package counts them."""
    from kimi_jax.model.config import load_model_config
    from kimi_jax.model.params import weight_table
    from kimi_jax.planning.flops import active_parameters

    case, _, _ = modules
    folder = ROOT / "configs" / "k2_thinking"
    config = load_model_config(folder)
    deeper = replace(config, num_hidden_layers=config.num_hidden_layers + 1)
    layer = active_parameters(weight_table(deeper), deeper) - active_parameters(
        weight_table(config), config
    )
    sizes = case.sizes_of(json.loads((folder / "config.json").read_text()))
    assert case.useful_operations(sizes, 10, 80) == 4 * 10 * layer


def test_rows_of_one_rank(modules):
    """Its experts are the first; all ranks' tokens choose as its own do."""
    case, _, _ = modules
    assert case.assignments_here((5, 1, 1, 1), 2) == 12
    assert case.assignments_here((5, 1, 1, 1), 1) == 8
