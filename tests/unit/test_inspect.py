"""`python -m kimi_jax.inspect`: its output and exit codes."""

import json
import subprocess
import sys

import pytest

from kimi_jax import inspect
from kimi_jax.command import run_command
from kimi_jax.errors import UserError
from tests.unit import golden

K2 = str(golden.checkpoint_directory("k2_thinking"))


def test_json_is_one_object(capsys):
    inspect.main(["--checkpoint", K2, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["directory"] == K2
    assert found["config"]["yarn"]["beta_fast"] == 1.0
    assert found["config"]["softmax_scale"] == pytest.approx(0.3543913, rel=1e-6)
    assert found["tensors"] == 187
    assert found["total"]["parameters"] == 192_016
    assert found["nibbles"]["packing"] == "offset_binary"
    assert found["nibbles"]["verdict"].startswith("offset binary confirmed")
    assert found["tokenizer"] is None


def test_tables(capsys):
    inspect.main(["--checkpoint", K2])
    out = capsys.readouterr().out
    assert "every tensor is as config.json implies" in out
    assert "offset binary confirmed" in out


def test_user_errors_are_messages(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run_command(inspect.main, ["--checkpoint", str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path}/nowhere: no such checkpoint directory\n"


@pytest.mark.parametrize("arguments", [[], ["--checkpoint"], ["--checkpoint", K2, "--nope"]])
def test_bad_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run_command(inspect.main, arguments)
    assert caught.value.code == 2
    assert "usage: python -m kimi_jax.inspect" in capsys.readouterr().err


def test_misread_experts_are_reported_and_fail(capsys, monkeypatch):
    """The report is printed whole, then the command fails: a script that looks at neither stops."""
    monkeypatch.setattr(
        "kimi_jax.weights.nibbles._packing", lambda nibble_8, nibble_0: "twos_complement"
    )
    with pytest.raises(SystemExit) as caught:
        run_command(inspect.main, ["--checkpoint", K2, "--json"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["nibbles"]["packing"] == "twos_complement"
    assert "error: " in captured.err
    assert "looks like two's complement" in captured.err


def test_as_a_process(tmp_path):
    command = [sys.executable, "-m", "kimi_jax.inspect", "--checkpoint", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {tmp_path}/config.json: not found; an HF checkpoint directory has a config.json\n"
    )


class TestRunCommand:
    def test_success_returns(self):
        seen = []
        run_command(seen.append, ["a"])
        run_command(seen.append)
        assert seen == [["a"], None]

    def test_interruption(self, capsys):
        def main(arguments):
            raise KeyboardInterrupt

        with pytest.raises(SystemExit) as caught:
            run_command(main)
        assert caught.value.code == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_defects_keep_their_traceback(self):
        """A ValueError of ours is not a user's mistake, though UserError is a ValueError."""

        def main(arguments):
            raise ValueError("defect")

        with pytest.raises(ValueError, match="defect") as caught:
            run_command(main)
        assert not isinstance(caught.value, UserError)
