"""What one row of a data file may hold, and its normal form. Every problem of a row is found."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no UTF-8 text can hold

ROLES = ("system", "user", "assistant", "tool")
_ROW_KEYS = ("messages", "tools", "prompt", "completion")
_MESSAGE_KEYS = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "reasoning_content", "tool_calls", "train"),
    "tool": ("role", "content", "name", "tool_call_id"),
}


@dataclass(frozen=True)
class Conversation:
    """A valid conversation: contents are strings, absent fields are absent rather than null."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    untrained: frozenset[int]  # indices of the assistant's messages marked `"train": false`


def parse_row(row: object) -> tuple[Conversation | None, list[str]]:
    """The conversation of one decoded JSON row, or None and all its problems.

    A row is `{"messages": […], "tools": […]}` (tools may be absent) or
    `{"prompt": text, "completion": text}`; the latter means one user message and the assistant's
    answer, and is rendered by the chat template like any other conversation.
    """
    if not isinstance(row, dict):
        return None, [f"a JSON object is required, found {_kind(row)}"]
    problems = _unknown_keys("", row, _ROW_KEYS)
    if "messages" in row:
        both = [key for key in ("prompt", "completion") if key in row]
        if both:
            problems.append(f"has messages and {' and '.join(both)}; a row is one or the other")
        conversation, more = _parse_messages(row["messages"], row.get("tools"), prompt=False)
        problems += more
    elif "prompt" in row or "completion" in row:
        if "tools" in row:
            problems.append("tools need messages; a row with prompt and completion has none")
        for key in ("prompt", "completion"):
            if key not in row:
                problems.append(f"{key} is missing")
            elif not isinstance(row[key], str) or not row[key].strip():
                problems.append(f"{key} must be text that is not empty, found {_kind(row[key])}")
        conversation = None
        if not problems:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            conversation, more = _parse_messages(messages, None, prompt=False)
            problems += more
    else:
        conversation = None
        problems.append('needs "messages", or "prompt" and "completion"')
    return (None if problems else conversation), problems


def prompt_problems(
    messages: object, tools: object = None
) -> tuple[Conversation | None, list[str]]:
    """As `parse_row`, for messages that the model shall continue: the last is not its own."""
    return _parse_messages(messages, tools, prompt=True)


def _parse_messages(
    messages: object, tools: object, prompt: bool
) -> tuple[Conversation | None, list[str]]:
    if not isinstance(messages, list) or not messages:
        return None, [f"messages must be a list of messages, found {_kind(messages)}"]
    problems: list[str] = []
    normal: list[dict[str, Any]] = []
    calls: set[str] = set()
    for index, message in enumerate(messages):
        parsed, found = _parse_message(f"messages[{index}]", message, calls)
        problems += found
        normal.append(parsed)
    roles = [message.get("role") for message in normal]
    if prompt and roles[-1] == "assistant":
        problems.append("the last message is the assistant's; there is nothing to answer")
    if not prompt and roles[-1] in ROLES and roles[-1] != "assistant":
        problems.append(f"the last message is from {roles[-1]}; it must be the assistant's answer")
    if tools is not None:
        problems += _tool_problems(tools)
    problems += [
        f"holds half of a surrogate pair ({text[:30]!r}…); it is not valid Unicode"
        for text in _texts([messages, tools])
        if _SURROGATE.search(text)
    ]
    if problems:
        return None, problems
    untrained = frozenset(i for i, m in enumerate(normal) if m.pop("train", True) is False)
    return Conversation(normal, tools if isinstance(tools, list) else None, untrained), []


def _parse_message(
    where: str, message: object, calls: set[str]
) -> tuple[dict[str, Any], list[str]]:
    """One message in normal form and its problems; adds the ids of its tool calls to `calls`."""
    if not isinstance(message, dict):
        return {}, [f"{where} must be an object, found {_kind(message)}"]
    role = message.get("role")
    if role not in ROLES:
        hint = _nearest(role, ROLES) if isinstance(role, str) else ""
        return {}, [f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}{hint}"]
    problems = _unknown_keys(f"{where}.", message, _MESSAGE_KEYS[role])
    normal = {key: value for key, value in message.items() if value is not None}
    for key in ("name", "reasoning_content"):
        if key in normal and not isinstance(normal[key], str):
            problems.append(f"{where}.{key} must be text, found {_kind(normal[key])}")
    content, found = _content(f"{where}.content", message)
    problems += found
    normal["content"] = content
    if role == "assistant":
        problems += _assistant_problems(where, normal, bool(found))
        for call in normal.get("tool_calls") or []:
            if isinstance(call, dict) and isinstance(call.get("id"), str):
                calls.add(call["id"])
        if not normal.get("tool_calls"):
            normal.pop("tool_calls", None)
    if role == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str):
            problems.append(f"{where}.tool_call_id must be text, found {_kind(call_id)}")
        elif call_id not in calls:
            problems.append(f"{where}.tool_call_id {call_id!r} answers no earlier tool call")
    return normal, problems


def _content(where: str, message: dict[str, Any]) -> tuple[str, list[str]]:
    """Content as one string: text, or a list of text parts joined; null only beside tool calls."""
    content = message.get("content")
    if isinstance(content, str):
        return content, []
    if content is None:
        if message.get("role") == "assistant" and message.get("tool_calls"):
            return "", []
        return "", [f"{where} is missing"]
    if not isinstance(content, list):
        return "", [f"{where} must be text or a list of text parts, found {_kind(content)}"]
    problems = []
    texts = []
    for index, part in enumerate(content):
        sound = isinstance(part, dict) and part.get("type") == "text" and len(part) == 2
        if sound and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            problems.append(f'{where}[{index}] must be {{"type": "text", "text": …}}')
    return "".join(texts), problems


def _assistant_problems(where: str, message: dict[str, Any], content_is_bad: bool) -> list[str]:
    problems = []
    if "train" in message and not isinstance(message["train"], bool):
        problems.append(f"{where}.train must be true or false, found {_kind(message['train'])}")
    content = message["content"]
    if not content_is_bad and not content.strip() and not message.get("tool_calls"):
        problems.append(
            f"{where}.content is empty: the assistant must say something or call a tool"
        )
    if content.lstrip().startswith("<think>") and "</think>" in content:
        problems.append(f"{where}.content holds <think>…</think>; reasoning_content is its place")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        return [*problems, f"{where}.tool_calls must be a list, found {_kind(calls)}"]
    for index, call in enumerate(calls):
        problems += _call_problems(f"{where}.tool_calls[{index}]", call)
    return problems


def _call_problems(where: str, call: object) -> list[str]:
    if not isinstance(call, dict):
        return [f"{where} must be an object, found {_kind(call)}"]
    problems = _unknown_keys(f"{where}.", call, ("id", "type", "function"))
    if call.get("type", "function") != "function":
        problems.append(f'{where}.type is {call["type"]!r}; it must be "function"')
    function = call.get("function")
    if not isinstance(function, dict):
        return [*problems, f"{where}.function must be an object, found {_kind(function)}"]
    problems += _unknown_keys(f"{where}.function.", function, ("name", "arguments"))
    name = function.get("name")
    if not isinstance(name, str) or not name:
        problems.append(f"{where}.function.name is missing")
    elif not re.fullmatch(rf"functions\.{re.escape(name)}:\d+", str(call.get("id"))):
        # Templates of this family write the id and nothing else that would name the function.
        problems.append(
            f"{where}.id is {call.get('id')!r}; it must be functions.{name}:N, "
            "N counting the conversation's calls from 0"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            return [*problems, f"{where}.function.arguments is not valid JSON: {error}"]
    if not isinstance(arguments, dict):
        problems.append(
            f"{where}.function.arguments must be an object or its JSON text, found "
            f"{_kind(arguments)}"
        )
    return problems


def _tool_problems(tools: object) -> list[str]:
    if not isinstance(tools, list) or not tools:
        return [f"tools must be a list of declarations, found {_kind(tools)}"]
    problems = []
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            problems.append(
                f'tools[{index}] must be {{"type": "function", "function": {{"name": …}}}}'
            )
    return problems


def _unknown_keys(prefix: str, value: dict[str, Any], known: tuple[str, ...]) -> list[str]:
    return [
        f"unknown key {prefix}{key}{_nearest(key, known)} (allowed: {', '.join(known)})"
        for key in value
        if key not in known
    ]


def _nearest(word: str, known: tuple[str, ...]) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {match[0]}?" if match else ""


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str | list | dict) and not value:
        return {str: "empty text", list: "an empty list", dict: "an empty object"}[type(value)]
    names = {str: "text", bool: "true/false", int: "a number", float: "a number"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
