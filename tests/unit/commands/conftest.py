"""A place to spoil: checkpoint, rows and configuration of a run, and what every refusal must be."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from kimi_jax import Trainer, train
from kimi_jax.command import run_command
from tests.unit.support import tiny_run, write_rows, write_tiny_checkpoint


@dataclass
class Place:
    """A folder of a test's own: `checkpoint`, `rows`, and the run's settings, all to change at will."""

    folder: Path
    settings: dict

    @property
    def checkpoint(self):
        return self.folder / "checkpoint"

    @property
    def rows(self):
        return self.folder / "train.jsonl"

    @property
    def run(self):
        return self.folder / "run"

    @property
    def config(self):
        return self.folder / "config.yaml"

    def write_settings(self):
        self.config.write_text(yaml.safe_dump(self.settings), encoding="utf-8")

    def contents(self):
        """Every file and its bytes."""
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a tiny checkpoint that no test may change."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def place(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "checkpoint")
    write_rows(tmp_path / "train.jsonl")
    place = Place(tmp_path, tiny_run(tmp_path, tmp_path / "checkpoint"))
    place.write_settings()
    return place


@pytest.fixture
def place_with_run(place):
    """A place whose run has a checkpoint, of no step yet."""
    Trainer(place.settings).save()
    return place


@pytest.fixture
def refused(capsys):
    """Runs a command that must refuse its arguments; returns its message on standard error.

    Every refusal has exit code 2 and one message without a traceback.
    """

    def run(command, *arguments):
        with pytest.raises(SystemExit) as ending:
            run_command(command.main, [str(argument) for argument in arguments])
        message = capsys.readouterr().err
        assert ending.value.code == 2, message
        assert "Traceback" not in message
        assert message.startswith(("error: ", "usage: ")), message
        return message

    return run


@pytest.fixture
def training_refused(place, refused):
    """Runs training in the place, which must refuse; checks that it wrote and changed nothing."""

    def run(*overrides):
        before = place.contents()
        message = refused(train, "--config", place.config, *overrides)
        assert place.contents() == before
        return message

    return run
