"""One step in flight: the order of things, the times, and a step that is not finite under another."""

from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from kimi_jax.config_file import load_config
from kimi_jax.data.examples import Examples
from kimi_jax.data.loader import Batches
from kimi_jax.data.rows import JsonlRows
from kimi_jax.training import loop, steps
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.data import RunData
from kimi_jax.training.metrics import Metrics, read_metrics
from kimi_jax.training.session import Session
from kimi_jax.training.step import StepMetrics
from kimi_jax.training.steps import NonFiniteError, Steps
from tests.unit.support import tiny_run, write_rows

HAND_OVER, COMPUTE, SAVE = 0.125, 4.0, 32.0  # seconds of a clock that only these advance


class Device:
    """Computes nothing: notes what is asked of it, by the number of the step, and when it is ready."""

    def __init__(self, config, table, model):
        self.config, self.checkpoint = config, SimpleNamespace(table=table, config=model)
        self.state, self.step, self.said = {}, 0, []
        self.now = self.free = 0.0

    def train_step(self, batch, after=None):
        self.step += 1
        self.now += HAND_OVER
        self.free = max(self.now, self.free) + COMPUTE
        self.said.append(f"dispatch {self.step}" + (" behind another" if after else ""))
        values = {"loss": 1.0, "weight_sum": 2.0, "grad_norm": 3.0, "finite": True}
        load = np.ones((1, 2))
        return StepMetrics(
            expert_load=Value(self, load, self.step, self.free),
            **{name: Value(self, v, self.step, self.free) for name, v in values.items()},
        )

    def read(self, number, ready):
        self.now = max(self.now, ready)
        if self.said[-1] != f"read {number}":
            self.said.append(f"read {number}")

    def save(self, state, data_state):
        self.said.append(f"save {self.step} at {data_state}")
        self.now += SAVE


class Value:
    """An array of a device."""

    def __init__(self, device, value, number, ready):
        self.device, self.value, self.number, self.ready = device, value, number, ready

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        self.device.read(self.number, self.ready)
        return np.asarray(self.value)


class Positions:
    """Endless batches, whose position is how many were taken."""

    taken = 0

    def __next__(self):
        self.taken += 1
        return {"segment_ids": np.ones((2, 8), np.int32)}

    def get_state(self):
        return self.taken


def test_a_step_is_read_when_the_next_is_dispatched(trainer, tiny, tmp_path, monkeypatch):
    """Fails if the loop reads a step's figures before it dispatches the next one; if what is saved is
    not of one moment; if time is counted twice, or a save's time as a step's."""
    run = tiny_run(tmp_path, tiny, train__steps=5, train__checkpoint_every=3)
    config = load_config(run)
    device = Device(config, trainer.checkpoint.table, trainer.checkpoint.config)
    checkpoints = SimpleNamespace(latest=None, save=device.save, wait=lambda: None)
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: device.now))
    with Metrics(tmp_path, 0) as metrics:
        data = RunData(config, None, None)
        console = Console(quiet=True)
        session = Session(
            device, config, tmp_path, data, Positions(), checkpoints, metrics, console
        )
        loop._run_steps(session)
    assert device.said == [
        "dispatch 1",
        "dispatch 2 behind another",
        "read 1",
        "dispatch 3 behind another",
        "read 2",
        "read 3",
        "save 3 at 3",
        "dispatch 4",
        "dispatch 5 behind another",
        "read 4",
        "read 5",
        "save 5 at 5",
        "save 5 at 5",  # the stub knows no latest checkpoint
    ]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    first, later = HAND_OVER + COMPUTE, COMPUTE
    assert [line["seconds"] for line in lines] == [first, later, later, first, later]


class Starved(Batches):
    """The second batch has no loss weight at all."""

    taken = 0

    def __next__(self):
        batch = super().__next__()
        self.taken += 1
        return {**batch, "loss_weights": batch["loss_weights"] * (self.taken != 2)}


def test_a_step_in_flight_behind_one_that_is_not_finite(trainer, tmp_path):
    """Fails if the step in vain changes the state, or if its batch or position is what is kept."""
    config, rows = trainer.config, write_rows(tmp_path / "train.jsonl")
    examples = Examples(JsonlRows(rows), trainer.chat, config.train.sequence_length)

    def batches():
        return Starved(examples, rows_per_batch=config.train.micro_batch, seed=0)

    first = batches()
    trainer.train_step({key: value[None] for key, value in next(first).items()})
    expected = {path: np.asarray(value) for path, value in trainer.state.adapters.items()}
    position = first.get_state()
    second = next(first)
    trainer.reset()

    data, console = RunData(config, examples, None), Console(quiet=True)
    with Checkpoints(tmp_path) as checkpoints, Metrics(tmp_path, 0) as metrics:
        session = Session(trainer, config, tmp_path, data, batches(), checkpoints, metrics, console)
        made = Steps(session)
        made.dispatch()
        made.dispatch()
        with pytest.raises(NonFiniteError, match="step 2 is not finite: no token of its batch"):
            made.dispatch()
        assert session.batches.taken == 3
        assert checkpoints.latest == 1
        kept, kept_position = checkpoints.restore(trainer.state)
    assert kept_position == position
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(kept.adapters[path]), value)
    batch = np.load(tmp_path / "nonfinite_step_2.npz")
    np.testing.assert_array_equal(batch["tokens"], second["tokens"][None])
    assert not batch["loss_weights"].any()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
