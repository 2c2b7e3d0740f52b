"""One loss for the same documents, however they are laid out: micro-batched, batched, packed, padded."""

import jax
import numpy as np
import pytest

from tests.unit.support import VOCAB

ROWS, LENGTH = 4, 16
SIZES = (7, 5, 8, 6)  # two documents fit into a row
LOSS = {"rtol": 1e-6, "atol": 0}
# fp32 sums in another order; relative to the largest element of each factor. Measured: 1.4e-6.
GRADIENT = 5e-6


def _documents():
    rng = np.random.default_rng(11)
    for size in SIZES:
        tokens = rng.integers(0, VOCAB, size).astype(np.int32)
        weights = rng.choice(np.float32([0, 0.5, 1, 2]), size)
        weights[-1] = 1
        yield tokens, weights


def _lay_out(rows, shape=(ROWS, LENGTH)):
    """Documents side by side in rows; the rest is padding, segment 0."""
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "loss_weights": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for row, documents in enumerate(rows):
        start = 0
        for number, (tokens, weights) in enumerate(documents, start=1):
            place = slice(start, start + len(tokens))
            batch["tokens"][row, place] = tokens
            batch["loss_weights"][row, place] = weights
            batch["positions"][row, place] = np.arange(len(tokens))
            batch["segment_ids"][row, place] = number
            start += len(tokens)
    return batch


def _unpacked():
    return _lay_out([[document] for document in _documents()])


def _packed():
    first, second, third, fourth = _documents()
    return _lay_out([[first, fourth], [third, second]])


def _micro_batches(rows=1):
    return [_lay_out([[document]], (rows, LENGTH)) for document in _documents()]


def _stacked(batches):
    """Four micro-batches; those that are not given are padding."""
    batches = batches + [_lay_out([])] * (4 - len(batches))
    return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


def _accumulated(trainer, batches):
    """Loss and gradients of the mean over batches, through `forward_backward`."""
    terms = [trainer.forward_backward(batch) for batch in batches]
    gradients = trainer.gradients()
    trainer._accumulated = None
    loss = sum(t["loss_sum"] for t in terms) / sum(t["weight_sum"] for t in terms)
    return loss, gradients


def _stepped(trainer, batches):
    """Loss, gradient norm and the step's gradients (AdamW's first moment is a tenth of them)."""
    before = trainer.state
    trainer.state = jax.tree.map(lambda value: value.copy(), before)
    metrics = trainer.train_step(_stacked(batches))
    moments = [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.state.opt_state)
        if ".mu" in jax.tree_util.keystr(path)
    ]
    trainer.state = before
    assert len(moments) == len(before.adapters)
    return float(metrics.loss), float(metrics.grad_norm), moments


def _assert_close(found, required):
    for one, other in zip(found, required, strict=True):
        assert np.abs(one - other).max() <= GRADIENT * np.abs(other).max()


def test_loss_is_that_of_the_logits(noisy):
    """Guards the whole path: shift by one, weights, denominator."""
    batch = _unpacked()
    logits = np.asarray(noisy.model(batch["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    weights = batch["loss_weights"].astype(np.float64)
    weights[:, 0] = 0
    rows, places = np.nonzero(weights)
    expected = -sum(
        weights[r, t] * log_p[r, t - 1, batch["tokens"][r, t]]
        for r, t in zip(rows, places, strict=True)
    )
    found = noisy.forward_backward(batch)
    np.testing.assert_allclose(found["loss_sum"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["weight_sum"], weights.sum(), rtol=1e-7)
    np.testing.assert_allclose(found["loss"], expected / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("layout", ["micro_batches", "packed"])
def test_forward_backward_does_not_depend_on_the_layout(noisy, layout):
    """Guards means of means, leaks between packed documents, and positions that do not restart."""
    loss, gradients = _accumulated(noisy, [_unpacked()])
    batches = {"micro_batches": _micro_batches(), "packed": [_packed()]}[layout]
    other_loss, other_gradients = _accumulated(noisy, batches)
    np.testing.assert_allclose(other_loss, loss, **LOSS)
    assert other_gradients.keys() == gradients.keys()
    _assert_close(other_gradients.values(), gradients.values())


def test_a_step_does_not_depend_on_the_layout(noisy):
    """The same through the one program of a step, whose micro-batches are accumulated in it."""
    loss, norm, gradients = _stepped(noisy, [_unpacked()])
    direct_loss, direct = _accumulated(noisy, [_unpacked()])
    np.testing.assert_allclose(loss, direct_loss, **LOSS)
    direct_norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in direct.values()))
    np.testing.assert_allclose(norm, direct_norm, rtol=1e-5)
    for batches in ([_packed()], _micro_batches(ROWS)):
        other_loss, other_norm, other_gradients = _stepped(noisy, batches)
        np.testing.assert_allclose(other_loss, loss, **LOSS)
        np.testing.assert_allclose(other_norm, norm, rtol=1e-5)
        _assert_close(other_gradients, gradients)


def test_padding_does_not_matter(noisy):
    """Guards padding that is seen by real tokens, counted, or that crowds them out of an expert."""
    batch = _unpacked()
    loss = noisy.evaluate([batch])
    junk = dict(batch, tokens=np.where(batch["segment_ids"] > 0, batch["tokens"], 999))
    assert noisy.evaluate([junk]) == loss
    wider = _lay_out([[document] for document in _documents()], (ROWS, LENGTH + 8))
    np.testing.assert_allclose(noisy.evaluate([wider])["loss"], loss["loss"], **LOSS)
    empty = {key: np.zeros_like(value) for key, value in batch.items()}
    assert noisy.evaluate([batch, empty]) == loss


def test_first_tokens_of_segments_count_for_nothing(noisy):
    """Guards a document's first token predicted from the document before it in the row."""
    batch = _packed()
    loss = noisy.evaluate([batch])
    first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    assert first.sum() == len(SIZES)
    heavier = dict(batch, loss_weights=np.where(first, np.float32(9), batch["loss_weights"]))
    assert noisy.evaluate([heavier]) == loss
    later = np.argwhere((batch["positions"] == 1) & (batch["segment_ids"] == 2))[0]
    batch["loss_weights"][tuple(later)] += 1
    assert noisy.evaluate([batch]) != loss
