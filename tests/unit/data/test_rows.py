import json
import pickle
import re

import pytest

from kimi_jax.data.row_schema import parse_row
from kimi_jax.data.rows import JsonlRows
from kimi_jax.errors import MissingFileError, UserError

GOOD = {"prompt": "p", "completion": "c"}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"id": "functions.f:0", "function": {"name": "f", "arguments": "{}"}}


def test_rows_are_read_by_index_and_survive_pickling(write_rows):
    path = write_rows(GOOD, {"prompt": "é你", "completion": "d"}, {"messages": [USER, ANSWER]})
    path.write_bytes(path.read_bytes()[:-1])  # the last line end is optional
    rows = JsonlRows(path)
    rows.check()
    again = pickle.loads(pickle.dumps(rows))
    assert len(again) == 3
    assert again[1].messages[0]["content"] == "é你"
    assert again[2].messages == [USER, ANSWER]
    assert again.where(2) == f"{path}:3"
    assert len(pickle.dumps(rows)) < 1000
    with pytest.raises(IndexError):
        rows[3]


def test_all_bad_rows_are_listed_with_their_lines(write_rows):
    path = write_rows(
        GOOD,
        '{"prompt": "p"',
        "",
        {"prompt": "p", "completion": 3, "extra": 1},
        {"messages": [USER, {"role": "asistant", "content": "a"}]},
        GOOD,
        "[1, 2]",
        '{"prompt": "p", "prompt": "q", "completion": "c"}',
        '{"prompt": "p", "completion": NaN}',
    )
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n' + b"\xef\xbb\xbf{}\n")
    with pytest.raises(UserError) as caught:
        JsonlRows(path).check()
    message = str(caught.value)
    for line, expected in [
        (2, "not valid JSON"),
        (3, "the line is empty"),
        (4, "unknown key extra"),
        (4, "completion must be text that is not empty, found a number"),
        (5, r"messages\[1\].role is 'asistant'.*did you mean assistant"),
        (7, "a JSON object is required, found a list"),
        (8, "key prompt occurs twice"),
        (9, "NaN is not JSON"),
        (10, "not UTF-8: byte 0xff at 12"),
        (11, "byte order mark"),
    ]:
        assert re.search(rf"{re.escape(str(path))}:{line}: .*{expected}", message), expected
    assert message.startswith("10 problems in")
    assert f"{path}:1:" not in message
    assert f"{path}:6:" not in message


def test_one_bad_row_is_an_error_when_it_is_read(write_rows):
    rows = JsonlRows(write_rows(GOOD, "{}"))
    with pytest.raises(UserError, match=r'rows\.jsonl:2: needs "messages", or "prompt"'):
        rows[1]


def test_absent_and_empty_files(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        JsonlRows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        JsonlRows(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, 'needs "messages"'),
        ({"prompt": "p"}, "completion is missing"),
        ({"prompt": "p", "completion": "  "}, "completion must be text that is not empty"),
        ({**GOOD, "messages": [USER, ANSWER]}, "has messages and prompt and completion"),
        ({**GOOD, "tools": []}, "tools need messages"),
        ({"message": [USER, ANSWER]}, "unknown key message, did you mean messages"),
        ({"messages": []}, "found an empty list"),
        ({"messages": [USER]}, "last message is from user"),
        ({"messages": [USER, "a"]}, r"messages\[1\] must be an object, found text"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"unknown key messages\[0\].weight"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\].content is missing"),
        ({"messages": [{**USER, "content": 7}, ANSWER]}, "found a number"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}, ANSWER]}, r"content\[0\] must be"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, r"unknown key messages\[0\].train"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "content is empty"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "content is missing"),
        ({"messages": [USER, {**ANSWER, "train": 0}]}, "train must be true or false"),
        (
            {"messages": [USER, {**ANSWER, "reasoning_content": 1}]},
            "reasoning_content must be text",
        ),
        ({"messages": [USER, {**ANSWER, "reasoning": "r"}]}, "did you mean reasoning_content"),
        (
            {"messages": [USER, {**ANSWER, "content": "<think>r</think>a"}]},
            "reasoning_content is its place",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f"}]}, "tool_calls must be a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, r"\[0\].function must be an object"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{**CALL, "id": "call_1"}]}]},
            r"tool_calls\[0\].id is 'call_1'; it must be functions.f:N",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{**CALL, "type": "x"}]}]},
            "type is 'x'",
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        **ANSWER,
                        "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}],
                    },
                ]
            },
            "arguments is not valid JSON",
        ),
        (
            {
                "messages": [
                    USER,
                    {**ANSWER, "tool_calls": [{**CALL, "function": {"arguments": "[]"}}]},
                ]
            },
            "arguments must be an object.*found an empty list",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "f:0"}, ANSWER]},
            "'f:0' answers no earlier tool call",
        ),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "tool_call_id must be"),
        ({"messages": [USER, ANSWER], "tools": {}}, "tools must be a list"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, r"tools\[0\] must be"),
        ({"messages": [{**USER, "content": "\ud83d"}, ANSWER]}, "surrogate"),
    ],
)
def test_each_fault_of_a_row_is_named(row, expected):
    conversation, problems = parse_row(row)
    assert conversation is None
    assert any(re.search(expected, problem) for problem in problems), problems


def test_several_faults_of_one_row_are_all_named():
    _, problems = parse_row({"messages": [{"role": "user"}, {**ANSWER, "train": 0}], "tool": 1})
    assert len(problems) == 3


def test_normal_form():
    calls = [{**CALL, "type": "function"}]
    conversation, problems = parse_row(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}], "name": None},
                {"role": "assistant", "content": None, "tool_calls": calls, "train": False},
                {"role": "tool", "tool_call_id": "functions.f:0", "content": ""},
                {**ANSWER, "tool_calls": None, "reasoning_content": None},
            ]
        }
    )
    assert problems == []
    assert conversation is not None
    assert conversation.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": ""},
        ANSWER,
    ]
    assert conversation.untrained == {1}
    assert json.dumps(conversation.messages)
