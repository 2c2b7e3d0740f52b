"""What is looked at while training: when, what is written, and the score of the answers."""

import jax.numpy as jnp
import pytest
from rich.console import Console

from kimi_jax.config_file import load_config
from kimi_jax.data.examples import Examples
from kimi_jax.data.loader import Batches
from kimi_jax.data.rows import JsonlRows
from kimi_jax.errors import RunStopped
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.data import RunData
from kimi_jax.training.evaluate import look
from kimi_jax.training.metrics import Metrics, read_metrics
from kimi_jax.training.session import Session
from tests.unit.support import ANSWERS, QUESTIONS, tiny_run, write_rows


@pytest.fixture
def session(trainer, tiny, tmp_path, monkeypatch):
    """A session whose trainer answers without computing: loss 2.5, and the answers of the rows."""
    rows = write_rows(tmp_path / "train.jsonl")
    settings = {"loss_every": 2, "sample_every": 3, "samples": 4, "pattern": "(is|hmm)\\.$"}
    changes = {f"evaluate__{key}": value for key, value in settings.items()}
    run = tiny_run(tmp_path, tiny, data__eval=str(rows), **changes)
    config = load_config({**run, "train": {**run["train"], "steps": 7}})
    examples = Examples(JsonlRows(rows), trainer.chat, 48)
    evaluated = []

    def evaluate(batches):
        evaluated.append(len(batches))
        return {"loss": 2.5, "loss_sum": 5.0, "weight_sum": 2.0}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    monkeypatch.setattr(trainer, "sample", lambda prompts, _: ANSWERS[: len(prompts)])
    console = Console(quiet=True)
    with Checkpoints(tmp_path) as checkpoints, Metrics(tmp_path, 0) as metrics:
        batches = Batches(examples, rows_per_batch=2, seed=0)
        data = RunData(config, examples, examples)
        yield Session(trainer, config, tmp_path, data, batches, checkpoints, metrics, console)
    assert all(number > 0 for number in evaluated)


def at(session, step):
    """Looks after `step` updates; returns the lines that were written."""
    session.trainer.state = session.trainer.state._replace(step=jnp.int32(step))
    before = len(read_metrics(session.directory))
    look(session)
    return read_metrics(session.directory)[before:]


def test_each_kind_comes_at_its_interval_first_and_last(session):
    found = {step: [line["kind"] for line in at(session, step)] for step in range(8)}
    assert found == {
        0: ["eval", "sample"],
        1: [],
        2: ["eval"],
        3: ["sample"],
        4: ["eval"],
        5: [],
        6: ["eval", "sample"],
        7: ["eval", "sample"],
    }


def test_what_is_written(session):
    loss, sample = at(session, 0)
    assert loss == {"kind": "eval", "step": 0, "loss": 2.5}
    pairs = zip(QUESTIONS[:4], ANSWERS[:4], strict=True)
    assert sample["answers"] == [{"prompt": q, "answer": a} for q, a in pairs]
    assert sample["score"] == 0.75  # "The bird." does not match


def test_nothing_is_looked_at_twice_or_while_stopping(session):
    """Guards a resumed run that would repeat lines, and a stop that waits for an evaluation."""
    at(session, 0)
    session.metrics._recorded |= {("eval", 2), ("sample", 3)}
    assert at(session, 2) == []
    assert at(session, 3) == []
    session.stop = "SIGTERM"
    assert at(session, 6) == []


def test_a_held_out_loss_that_is_not_finite_stops_the_run(session, monkeypatch):
    monkeypatch.setattr(session.trainer, "evaluate", lambda _: {"loss": float("nan")})
    with pytest.raises(RunStopped, match="the held-out loss after step 0 is nan; look at the rows"):
        at(session, 0)
