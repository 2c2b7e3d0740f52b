import itertools
import json
from collections import Counter

import numpy as np
import pytest

from kimi_jax.data.examples import Examples
from kimi_jax.data.loader import Batches, held_out_batches
from kimi_jax.data.rows import JsonlRows
from kimi_jax.errors import UserError

SENTENCE = "the river runs to the sea and the sea does not ask where it has been"
WORDS = SENTENCE.split()


def row(index):
    """Rows of different lengths; every third holds two answers, so it gives two examples."""
    text = " ".join(WORDS[: 1 + index * 5 % len(WORDS)])
    messages = [
        {"role": "system", "content": f"{index}"},
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": text},
    ]
    if index % 3 == 0:
        messages += [
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": f"{text} {index}", "reasoning_content": "so"},
        ]
    return {"messages": messages}


LENGTH = 128


@pytest.fixture
def examples(write_rows, chat):
    return Examples(JsonlRows(write_rows(*map(row, range(12)))), chat, LENGTH)


def documents(batches):
    """Every document of some batches: (tokens, loss weights), each checked to be undivided."""
    found = []
    for batch in batches:
        assert {key: value.dtype.name for key, value in batch.items()} == {
            "tokens": "int32",
            "loss_weights": "float32",
            "positions": "int32",
            "segment_ids": "int32",
        }
        for index, segments in enumerate(batch["segment_ids"]):
            last = int(segments.max())
            used = int(np.count_nonzero(segments))
            assert (segments[used:] == 0).all()
            assert sorted(set(segments[:used].tolist())) == list(range(1, last + 1))
            assert not batch["loss_weights"][index, used:].any()
            assert not batch["positions"][index, used:].any()
            for segment in range(1, last + 1):
                places = np.flatnonzero(segments == segment)
                assert places.tolist() == list(range(places[0], places[-1] + 1))
                positions = batch["positions"][index, places]
                assert positions.tolist() == list(range(len(places)))
                weights = batch["loss_weights"][index, places]
                assert weights[0] == 0
                found.append((tuple(batch["tokens"][index, places]), tuple(weights)))
    return found


def expected(examples):
    pairs = (examples[i] for i in range(len(examples)))
    return Counter((tuple(e.tokens), tuple(e.loss_weights)) for e in pairs)


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a)


def test_rows_are_expanded_to_one_example_an_answer(examples):
    assert len(examples) == 12 + 4
    assert examples.counts.rows == 12
    assert examples.counts.examples == 16
    assert examples.counts.tokens == sum(examples.lengths) == sum(len(e) for e in examples)
    assert examples.counts.trained_tokens == sum(e.trained for e in examples)
    assert examples.where(2).endswith("rows.jsonl:2")  # the first row gives examples 0 and 1
    assert len({tuple(e.tokens) for e in examples}) == 16


def test_progress_is_told(write_rows, chat):
    seen = []
    Examples(JsonlRows(write_rows(row(1), row(2))), chat, LENGTH, progress=seen.append)
    assert seen == [0, 1, 2]


def test_examples_not_kept_in_memory_are_the_same(examples):
    kept = [examples[i] for i in range(len(examples))]
    examples._cache.clear()
    for index, example in enumerate(kept):
        assert examples[index].tokens.tolist() == example.tokens.tolist()
        assert examples[index].loss_weights.tolist() == example.loss_weights.tolist()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("rows_per_batch", [1, 3, 8])
def test_one_pass_holds_every_document_once_and_whole(examples, pack, rows_per_batch):
    # Guards against leakage: a document split, merged with another, lost or doubled.
    batches = list(held_out_batches(examples, rows_per_batch=rows_per_batch, pack=pack))
    assert all(batch["tokens"].shape == (rows_per_batch, LENGTH) for batch in batches)
    assert Counter(documents(batches)) == expected(examples)


def test_without_packing_a_row_holds_one_document_in_order(examples):
    batches = list(held_out_batches(examples, rows_per_batch=5, pack=False))
    assert [tuple(d[0]) for d in documents(batches)] == [tuple(e.tokens) for e in examples]
    assert max(int(batch["segment_ids"].max()) for batch in batches) == 1
    assert [int(b["segment_ids"].any(axis=1).sum()) for b in batches] == [5, 5, 5, 1]


def test_packing_saves_rows(examples):
    packed = len(list(held_out_batches(examples, rows_per_batch=1)))
    assert packed < len(examples)


@pytest.mark.parametrize("pack", [True, False])
def test_training_batches_are_endless_and_repeatable(examples, pack):
    def take(seed, count=30):
        batches = Batches(examples, rows_per_batch=2, seed=seed, pack=pack)
        return list(itertools.islice(batches, count))

    first = take(1)
    assert all(map(same, first, take(1)))
    assert not all(map(same, first, take(2)))
    counts = Counter(documents(first))
    assert set(counts) == set(expected(examples))
    if not pack:  # two rows a batch: sixteen examples are eight batches
        epochs = [documents(first[i : i + 8]) for i in (0, 8, 16)]
        assert all(Counter(epoch) == expected(examples) for epoch in epochs)
        assert epochs[0] != epochs[1]  # a new order each time


def test_without_shuffling_the_order_is_the_files(examples):
    batches = Batches(examples, rows_per_batch=4, seed=0, shuffle=False, pack=False)
    assert batches.epoch_size == 16
    found = documents(itertools.islice(batches, 5))
    order = [tuple(e.tokens) for e in examples]
    assert [d[0] for d in found] == order + order[:4]


@pytest.mark.parametrize("pack", [True, False])
def test_state_is_restored_exactly_at_every_batch(write_rows, chat, pack):
    # Guards resumption, invariant 8: in mid-epoch, and in the middle of the packer's open rows.
    examples = Examples(JsonlRows(write_rows(*map(row, range(60)))), chat, LENGTH)

    def fresh():
        return Batches(examples, rows_per_batch=3, seed=5, pack=pack)

    batches = fresh()
    states, produced = [json.dumps(batches.get_state())], []
    for _ in range(14):
        produced.append(next(batches))
        states.append(json.dumps(batches.get_state()))
    for step in range(13):
        resumed = fresh()
        next(resumed)
        resumed.set_state(json.loads(states[step]))
        assert same(next(resumed), produced[step])
        assert same(next(resumed), produced[step + 1])
        assert json.dumps(resumed.get_state()) == states[step + 2]


def test_state_of_other_data_or_settings_is_refused(examples, write_rows, chat):
    state = Batches(examples, rows_per_batch=2, seed=0).get_state()
    with pytest.raises(UserError, match=r"seed: was 0, is 1\n.*- pack: was True, is False"):
        Batches(examples, rows_per_batch=2, seed=1, pack=False).set_state(state)
    path = write_rows(*map(row, range(11)), name="other.jsonl")
    other = Examples(JsonlRows(path), chat, LENGTH)
    with pytest.raises(UserError, match="examples: was"):
        Batches(other, rows_per_batch=2, seed=0).set_state(state)


def test_overlong_examples_are_an_error_that_lists_them(write_rows, chat):
    rows = JsonlRows(write_rows(*map(row, (1, 2, 4, 5, 7, 8))))
    whole = Examples(rows, chat, 1000)
    limit = int(np.sort(whole.lengths)[-3])
    with pytest.raises(UserError) as caught:
        Examples(rows, chat, limit)
    longer = [i for i in range(len(whole)) if len(whole[i]) > limit]
    assert len(longer) == 2
    for index in longer:
        assert f"{whole.where(index)}: {len(whole[index])} tokens" in str(caught.value)
    assert "data.overlong" in str(caught.value)
    dropped = Examples(rows, chat, limit, "drop")
    assert (dropped.counts.dropped, len(dropped)) == (2, len(whole) - 2)
    cut = Examples(rows, chat, limit, "truncate")
    assert (cut.counts.truncated, len(cut)) == (2, len(whole))
    assert cut[longer[0]].tokens.tolist() == whole[longer[0]].tokens[:limit].tolist()
    assert cut.lengths.max() == limit
    cut._cache.clear()
    assert len(cut[longer[0]]) == limit
    with pytest.raises(UserError, match="nothing to train on"):
        Examples(rows, chat, 10, "truncate")  # no trained token is within the first ten
    with pytest.raises(UserError, match="must be one of error, drop, truncate"):
        Examples(rows, chat, 10, "trim")  # type: ignore[arg-type]


def test_bad_rows_are_all_listed_before_anything_is_trained(write_rows, chat):
    path = write_rows(row(0), "{}", row(1), {"prompt": "p"})
    with pytest.raises(UserError, match=r"(?s)2 problems.*:2: needs.*:4: completion is missing"):
        Examples(JsonlRows(path), chat, LENGTH)


def test_rows_without_anything_to_train_are_counted(write_rows, chat):
    quiet = {"role": "assistant", "content": "a", "train": False}
    silent = {"messages": [{"role": "user", "content": "q"}, quiet]}
    path = write_rows(row(1), silent)
    assert Examples(JsonlRows(path), chat, LENGTH).counts.untrained_rows == 1
    with pytest.raises(UserError, match="nothing to train on"):
        Examples(JsonlRows(write_rows(silent)), chat, LENGTH)
