"""Rows that cannot be trained on: every bad line by its number, before a step is made."""

import json

import pytest

from tests.unit.support import write_rows

GOOD = {"prompt": "Who sings?", "completion": "The bird."}
USER = {"role": "user", "content": "Who sings?"}
ANSWER = {"role": "assistant", "content": "The bird."}

ROWS = {
    "several bad lines": (
        [GOOD, "{not json", GOOD, '["a list"]', {"prompt": "alone"}],
        [
            "3 problems in",
            "train.jsonl:2: not valid JSON",
            "train.jsonl:4: a JSON object is required, found a list",
            "train.jsonl:5: completion is missing",
        ],
    ),
    "an empty line": ([GOOD, ""], ["train.jsonl:2: the line is empty"]),
    "an unknown key": (
        [{**GOOD, "complation": "x"}],
        ["train.jsonl:1: unknown key complation, did you mean completion?"],
    ),
    "a key twice": (
        ['{"prompt": "a", "prompt": "b", "completion": "c"}'],
        ["train.jsonl:1: key prompt occurs twice"],
    ),
    "no answer": (
        [{"messages": [USER]}],
        ["train.jsonl:1: the last message is from user; it must be"],
    ),
    "an unknown role": (
        [{"messages": [{**USER, "role": "human"}, ANSWER]}],
        ["messages[0].role is 'human'; it must be one of system, user, assistant, tool"],
    ),
    "both forms": (
        [{**GOOD, "messages": [USER, ANSWER]}],
        ["train.jsonl:1: has messages and prompt and completion"],
    ),
    "an empty answer": ([{**GOOD, "completion": " "}], ["train.jsonl:1: completion must be text"]),
    "a number for text": (
        [{**GOOD, "prompt": 3}],
        ["prompt must be text that is not empty, found a n"],
    ),
    "not a number of JSON": (['{"prompt": NaN}'], ["train.jsonl:1: NaN is not JSON"]),
    "nothing that trains": (
        [{"messages": [USER, {**ANSWER, "train": False}]}],
        ["nothing to train on. Of 1 rows, 1 mark every answer"],
    ),
    "rows too long": (
        [GOOD, {**GOOD, "completion": "The bird sings. " * 40}],
        [
            "1 examples in",
            "are longer than train.sequence_length 48",
            "train.jsonl:2: ",
            'or set data.overlong to "drop" or "truncate"',
        ],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(place, training_refused, name):
    rows, required = ROWS[name]
    write_rows(place.rows, rows)
    message = training_refused()
    for part in required:
        assert part in message


@pytest.mark.parametrize(
    ("content", "required"),
    [
        (b"", "is empty; one JSON object a line is required"),
        (b'{"prompt": "\xff"}\n', "train.jsonl:1: not UTF-8: byte 0xff at 12"),
        (b"\xef\xbb\xbf{}\n", "train.jsonl:1: begins with a byte order mark"),
    ],
)
def test_files(place, training_refused, content, required):
    place.rows.write_bytes(content)
    assert required in training_refused()


def test_a_file_that_is_not_there(place, training_refused):
    place.rows.unlink()
    assert "train.jsonl does not exist. Give a JSONL file" in training_refused()


def test_held_out_rows_are_checked_too(place, training_refused):
    held_out = write_rows(place.folder / "held_out.jsonl", [GOOD, {"prompt": "alone"}])
    message = training_refused(f"data.eval={held_out}", "evaluate.loss_every=1")
    assert "held_out.jsonl:2: completion is missing" in message


def test_a_preview_checks_the_rows(place, training_refused):
    write_rows(place.rows, [GOOD, json.dumps(GOOD)[:-4]])
    assert "train.jsonl:2: not valid JSON" in training_refused("--preview", "1")
