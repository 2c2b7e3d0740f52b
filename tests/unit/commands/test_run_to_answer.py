"""From a run to an adapter and to answers, through the commands."""

import json
import re

import jax
import pytest

from kimi_jax import Trainer, export, generate, train
from tests.unit.support import ANSWERS, QUESTIONS


@pytest.fixture
def light_compiler():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_a_runs_export_is_its_trainers(place_with_run, capsys):
    """Guards an export of other adapters than those of the newest checkpoint."""
    out = place_with_run.folder / "adapter"
    export.main(["--run", str(place_with_run.run), "--format", "peft", "--out", str(out)])
    assert f"Wrote peft to {out}." in capsys.readouterr().out
    own = Trainer(place_with_run.settings).export(place_with_run.folder / "own")
    for path in own.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_generate_answers_from_a_run(place_with_run, capsys, light_compiler):
    questions = QUESTIONS[:2]
    arguments = [part for question in questions for part in ("--prompt", question)]
    run = str(place_with_run.run)
    generate.main(["--run", run, *arguments, "--max-new-tokens", "4", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == questions
    for answer in answers:
        assert answer.keys() == {"prompt", "reasoning", "content"}
        assert isinstance(answer["content"], str)


def test_a_preview_shows_rows_and_trains_nothing(place, capsys):
    before = place.contents()
    train.main(["--config", str(place.config), "--preview", "2"])
    output = re.sub(r"[\n⟦⟧]", "", capsys.readouterr().out)
    assert f"{place.rows}:1" in output
    assert ANSWERS[0] in output
    assert ANSWERS[1] in output
    assert ANSWERS[2] not in output
    assert place.contents() == before
