"""What a loop of one's own needs: begin again, a learning rate of its own, and the run's batches."""

import jax
import numpy as np
import pytest

from kimi_jax.config_file import load_config
from kimi_jax.data.loader import Batches
from kimi_jax.errors import UserError
from kimi_jax.training.data import read_data
from tests.unit.support import QUESTIONS, VOCAB, tiny_run, write_rows


def batch(seed=5):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (4, 16)).astype(np.int32)
    return {"tokens": tokens, "loss_weights": np.ones(tokens.shape, np.float32)}


def adapters_of(trainer):
    return {path: np.asarray(value) for path, value in trainer.state.adapters.items()}


def step(trainer, **arguments):
    """The change of every adapter by one update from the beginning."""
    trainer.reset()
    before = adapters_of(trainer)
    trainer.forward_backward(batch())
    made = trainer.optim_step(**arguments)
    return made, {path: after - before[path] for path, after in adapters_of(trainer).items()}


def test_reset_begins_again(trainer):
    """Guards adapters, moments, counters or gradients of the run before."""
    trainer.reset()
    fresh = [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.state)]
    trainer.forward_backward(batch())
    trainer.optim_step()
    trainer.forward_backward(batch())
    trainer.reset()
    assert trainer.step == 0
    for found, expected in zip(jax.tree.leaves(trainer.state), fresh, strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="call forward_backward first"):
        trainer.optim_step()


def test_learning_rate_of_ones_own(trainer):
    """Guards a rate that is ignored, applied twice, or compiled in at its first value."""
    rate = trainer.config.train.learning_rate
    made, configured = step(trainer)
    assert made["learning_rate"] == pytest.approx(rate)
    for part in (1, 0.5, 2):
        made, change = step(trainer, learning_rate=part * rate)
        assert made["learning_rate"] == part * rate
        for path, expected in configured.items():
            np.testing.assert_allclose(change[path], part * expected, rtol=1e-4, atol=1e-8)


def test_own_rate_and_the_configurations_share_a_state(trainer):
    """Guards moments that only one of the two kinds of update would read."""
    trainer.reset()
    for arguments in ({}, {"learning_rate": 1e-3}, {}):
        trainer.forward_backward(batch())
        trainer.optim_step(**arguments)
    assert trainer.step == 3


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan"), float("inf")])
def test_bad_rates_are_refused(trainer, rate):
    trainer.forward_backward(batch())
    with pytest.raises(UserError, match=r"learning_rate is .*; required: a number above 0"):
        trainer.optim_step(learning_rate=rate)
    assert trainer.step == 0


def test_data_of_a_run(tiny, base_parts, tmp_path):
    """Guards batches that are not those of `kimi_jax.train`, and prompts that hold the answer."""
    write_rows(tmp_path / "train.jsonl")
    values = tiny_run(tmp_path, tiny, data__eval=str(tmp_path / "train.jsonl"))
    config = load_config(values)
    data = read_data(config, base_parts.chat)
    expected = Batches(data.train, rows_per_batch=2, seed=config.run.seed)
    found = data.batches()
    for _ in range(3):
        ours, theirs = next(found), next(expected)
        assert ours["tokens"].shape == (2, 48)
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value)
    weights = sum(held["loss_weights"].sum() for held in data.held_out_batches())
    assert weights == data.train.counts.trained_tokens
    assert data.questions() == QUESTIONS
    for prompt, example in zip(data.prompts(), data.train, strict=False):
        assert not example.loss_weights[: len(prompt)].any()
        np.testing.assert_array_equal(prompt, example.tokens[: len(prompt)])


def test_held_out_rows_that_a_run_has_not(trainer):
    for ask in (trainer.data.prompts, trainer.data.questions, trainer.data.held_out_batches):
        with pytest.raises(UserError, match=r"set data\.eval"):
            ask()
