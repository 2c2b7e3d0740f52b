"""The checkpoint's chat template, and what it writes around an assistant's turn.

The frame of a turn is not assumed but measured, by rendering small conversations: which control
tokens open and close it, what the generation prompt writes ahead of the model, how reasoning is
marked, and what a tool call adds.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.vocabulary import TOKENIZER_CONFIG_FILE, read_json
from kimi_jax.errors import UserError

TEMPLATE_FILE = "chat_template.jinja"

Message = dict[str, Any]

# A tool call that no one makes: the template takes a message that carries it for unfinished.
_SENTINEL = {
    "id": "functions.\U0010fffd:0",
    "type": "function",
    "function": {"name": "\U0010fffd", "arguments": "{}"},
}
_ASKED: Message = {"role": "user", "content": "the question"}
_ANSWERED: Message = {"role": "assistant", "content": "the answer"}
_REASONED: Message = {**_ANSWERED, "reasoning_content": "the reasoning"}


@dataclass(frozen=True)
class Frame:
    """What the template writes around an assistant's turn: `role` name `middle` body `end`."""

    role: str  # the control token that opens an assistant's turn
    middle: str  # the control token between the name and the body
    end: str  # the control token that closes it
    prefill: str  # what the generation prompt already writes of the body
    reasoning: tuple[str, str] | None  # what stands before and after it; None: not rendered
    sentinel: str  # what the sentinel tool call adds at the end of the body; "" if nothing


class Template:
    """Renders conversations to text. `source` is the template's own text."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, variables: dict[str, str], origin: str
    ) -> None:
        self.source = source
        self._variables = variables
        self._origin = origin
        self.frame = self._measure(tokenizer)

    @classmethod
    def from_checkpoint(cls, directory: Path, tokenizer: Tokenizer) -> "Template":
        """`chat_template.jinja` of the checkpoint, else `chat_template` of tokenizer_config.json.

        Raises UserError if there is none, if it cannot be rendered, or if it does not frame an
        assistant's turn with control tokens as this family does.
        """
        directory = Path(directory)
        config = read_json(directory / TOKENIZER_CONFIG_FILE)
        path = directory / TEMPLATE_FILE
        if path.is_file():
            try:
                source, origin = path.read_text(encoding="utf-8"), str(path)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 (byte {error.start}).") from error
        else:
            source, origin = config.get("chat_template"), str(directory / TOKENIZER_CONFIG_FILE)
            if isinstance(source, list):  # several, each with a name
                named = [entry for entry in source if isinstance(entry, dict)]
                defaults = [e.get("template") for e in named if e.get("name") == "default"]
                source = defaults[0] if defaults else None
        if not isinstance(source, str) or not source.strip():
            raise UserError(
                f"{directory} has no chat template: neither {TEMPLATE_FILE} nor chat_template in "
                f"{TOKENIZER_CONFIG_FILE}. It comes with the checkpoint: download it again."
            )
        variables = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                variables[key] = value
        return cls(source, tokenizer, variables, origin)

    def render(
        self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool = False
    ) -> str:
        """The whole conversation as the template writes it. UserError if the template refuses."""
        render_jinja_template = _renderer()
        if tools and "tools_ts_str" in self.source:
            raise UserError(
                f"{self._origin} wants tools as TypeScript text (tools_ts_str), which only the "
                "checkpoint's own Python code can write. Rows with tools cannot be used with it."
            )
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                # The family's tokenizers sort the tools' keys before they render them.
                tools=_sorted_keys(tools) if tools else None,
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template {self._origin} failed: {error}") from error
        return rendered[0]

    def render_open(self, messages: list[Message], tools: list[Any] | None) -> str:
        """Renders a conversation whose last message is the assistant's as one that is under way.

        A template of this family drops the reasoning of every turn up to the last answer without
        a tool call, so a conversation that ends with such an answer would lose the reasoning
        that is to be learnt. The last answer is therefore rendered with a tool call, which is
        then cut out of the text again.
        """
        last = messages[-1]
        if not self.frame.sentinel or last.get("tool_calls"):
            return self.render(messages, tools)
        text = self.render([*messages[:-1], {**last, "tool_calls": [_SENTINEL]}], tools)
        if text.count(self.frame.sentinel) != 1:
            raise UserError(
                f"the chat template {self._origin} writes a tool call differently here than in a "
                "short conversation; the last turn's reasoning cannot be kept."
            )
        return text.replace(self.frame.sentinel, "")

    def _measure(self, tokenizer: Tokenizer) -> Frame:
        """Finds the frame. UserError where the template does not work as this family's do."""
        asked = self.render([_ASKED], None)
        prompted = self._beyond(asked, self.render([_ASKED], None, generation_prompt=True))
        tokens = list(tokenizer.control_pattern.finditer(prompted))
        if len(tokens) < 2 or tokens[0].start() != 0 or tokens[0].group() in asked:
            raise self._foreign(
                f"the generation prompt {prompted!r} does not open with a control token of the "
                "assistant's own, its name and a second control token"
            )
        header = prompted[: tokens[1].end()]
        answered = self._beyond(asked, self.render([_ASKED, _ANSWERED], None))
        closing = list(tokenizer.control_pattern.finditer(answered))
        if not answered.startswith(header) or closing[-1].group() != tokenizer.end_name:
            raise self._foreign(
                f"an assistant's turn is rendered as {answered!r}, which does not open with "
                f"{header!r} and close with {tokenizer.end_name!r}, the checkpoint's eos_token_id"
            )
        close = closing[-1].start()
        called = self._beyond(
            asked, self.render([_ASKED, {**_ANSWERED, "tool_calls": [_SENTINEL]}], None)
        )
        added = self._between(answered[:close], answered[close:], called)
        reasoned = self._beyond(
            asked, self.render([_ASKED, {**_REASONED, "tool_calls": [_SENTINEL]}], None)
        )
        reasoning = None
        body = reasoned[len(header) :]
        if _REASONED["reasoning_content"] in body:
            before, rest = body.split(_REASONED["reasoning_content"], 1)
            reasoning = before, rest.split(_REASONED["content"], 1)[0]
        return Frame(
            role=tokens[0].group(),
            middle=tokens[1].group(),
            end=tokenizer.end_name,
            prefill=prompted[len(header) :],
            reasoning=reasoning,
            sentinel=added,
        )

    def _beyond(self, start: str, text: str) -> str:
        if not text.startswith(start):
            raise self._foreign("a conversation does not begin with its own first message")
        return text[len(start) :]

    def _between(self, start: str, end: str, text: str) -> str:
        if not text.startswith(start) or not text.endswith(end):
            raise self._foreign("a tool call is not written between the answer and the turn's end")
        return text[len(start) : len(text) - len(end)]

    def _foreign(self, reason: str) -> UserError:
        return UserError(
            f"{self._origin} is not a chat template of this family: {reason}. Use the template "
            "that the checkpoint was released with."
        )


def _sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted_keys(entry) for entry in value]
    return value


def _renderer() -> Any:
    """transformers' own renderer, imported late because its import takes a second.

    At import transformers advises installing PyTorch; nothing here uses what that would add.
    """
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(keep)
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    finally:
        logger.removeFilter(keep)
    return render_jinja_template
