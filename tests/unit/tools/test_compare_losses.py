"""`tools/compare_losses.py`: what counts as equal, what is shown, and the exit codes."""

import importlib.util
import json
from pathlib import Path

import pytest

from kimi_jax.command import run_command

TOOL = Path(__file__).parents[3] / "tools" / "compare_losses.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_losses", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compared(tool, capsys):
    """Runs the tool; returns exit code, standard output and standard error."""

    def run(*arguments):
        code = 0
        try:
            run_command(tool.main, [str(argument) for argument in arguments])
        except SystemExit as ending:
            code = ending.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return run


def record(path, *lines):
    """A record with a line for each (kind, step, loss); other kinds and fields are ignored."""
    path.parent.mkdir(exist_ok=True)
    written = [
        {"kind": kind, "step": step, "loss": loss, "seconds": 3.5} for kind, step, loss in lines
    ]
    written.append({"kind": "sample", "step": 9, "answers": ["a\u2028b"]})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written)
    path.write_text(text, encoding="utf-8")
    return path


LINES = [("eval", 0, 3.5), ("step", 1, 3.25), ("step", 2, 2.0), ("eval", 2, 1.875)]


def changed(number, loss):
    return [*LINES[:number], (*LINES[number][:2], loss), *LINES[number + 1 :]]


def test_equal_records(compared, tmp_path):
    record(tmp_path / "run" / "metrics.jsonl", *LINES)
    other = record(tmp_path / "golden.jsonl", *LINES)
    code, output, _ = compared(tmp_path / "run", other)
    assert code == 0
    assert "4 losses in both" in output
    assert "largest difference 0; 0 beyond the tolerance of 0" in output


@pytest.mark.parametrize("number", range(len(LINES)))
def test_the_last_bit_counts(compared, tmp_path, number):
    """Guards a comparison of rounded or of only some losses."""
    a = record(tmp_path / "a.jsonl", *LINES)
    b = record(tmp_path / "b.jsonl", *changed(number, LINES[number][2] * (1 + 2**-52)))
    code, output, _ = compared(a, b)
    kind, step, loss = LINES[number]
    assert code == 1
    assert f"{kind} {step}" in output
    assert repr(loss) in output
    assert f"at {kind} {step}; 1 beyond the tolerance" in output


def test_the_tolerance(compared, tmp_path):
    a = record(tmp_path / "a.jsonl", *LINES)
    b = record(tmp_path / "b.jsonl", *changed(2, 2.25))
    assert compared(a, b, "--tolerance", "0.25")[0] == 0
    code, output, _ = compared(a, b, "--tolerance", "0.2")
    assert code == 1
    assert "largest difference 0.25, at step 2" in output


def test_a_step_that_one_record_lacks(compared, tmp_path):
    a = record(tmp_path / "a.jsonl", *LINES)
    b = record(tmp_path / "b.jsonl", *LINES[:2])
    for one, other in ((a, b), (b, a)):
        code, output, _ = compared(one, other, "--tolerance", "100")
        assert code == 1
        assert output.count("missing") == 2
        assert "2 losses in both" in output


def test_losses_that_are_not_finite(compared, tmp_path):
    """NaN differs from every number, whatever the tolerance, and not from itself."""
    a = record(tmp_path / "a.jsonl", *changed(1, float("nan")))
    b = record(tmp_path / "b.jsonl", *changed(1, float("nan")))
    c = record(tmp_path / "c.jsonl", *changed(1, float("inf")))
    good = record(tmp_path / "d.jsonl", *LINES)
    assert compared(a, b)[0] == 0
    for other in (good, c):
        assert compared(a, other, "--tolerance", "100")[0] == 1
        assert compared(other, a, "--tolerance", "100")[0] == 1


def test_a_golden_is_a_record(compared, tmp_path):
    """A golden keeps every digit, and nothing that another machine would write differently."""
    run = record(tmp_path / "run" / "metrics.jsonl", *LINES, ("step", 3, 0.1 + 0.2))
    golden = tmp_path / "golden.jsonl"
    assert compared(tmp_path / "run", "--write", golden)[0] == 0
    assert compared(golden, run)[0] == 0
    written = [json.loads(line) for line in golden.read_text().splitlines()]
    assert [set(line) for line in written] == [{"kind", "step", "loss"}] * 5


@pytest.mark.parametrize(
    ("content", "required"),
    [
        (None, "bad.jsonl: not found; give a run directory, a metrics.jsonl or a golden"),
        ("", "no line of kind step or eval"),
        ('{"kind": "step", "step": 1, "loss": 2}\n{"kind": "st', "line 2: not a line of a record"),
        ('{"kind": "step", "step": 1}\n', "line 1: not a line of a record: KeyError('loss')"),
        ("[1]\n", "line 1: not a line of a record"),
        ('{"kind": "step", "step": 1, "loss": 2}\n' * 2, "line 2: step 1 stands twice"),
    ],
)
def test_what_is_no_record(compared, tmp_path, content, required):
    good = record(tmp_path / "good.jsonl", *LINES)
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    for pair in ((good, bad), (bad, good)):
        code, _, message = compared(*pair)
        assert code == 2
        assert message.startswith("error: ")
        assert required in message


@pytest.mark.parametrize(
    ("arguments", "required"),
    [
        ([], "give B to compare with, or --write"),
        (["{a}", "--write", "x"], "give B to compare with, or --write"),
        (["{a}", "--tolerance", "-1"], "--tolerance is -1.0; required: 0 or more"),
        (["{a}", "--tolerance", "nan"], "--tolerance is nan; required: 0 or more"),
    ],
)
def test_bad_arguments(compared, tmp_path, arguments, required):
    a = record(tmp_path / "a.jsonl", *LINES)
    code, _, message = compared(a, *(argument.format(a=a) for argument in arguments))
    assert code == 2
    assert required in message
