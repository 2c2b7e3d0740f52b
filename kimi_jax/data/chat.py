"""Conversations to tokens with loss weights, by the checkpoint's own chat template."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from kimi_jax.data.row_schema import Conversation, prompt_problems
from kimi_jax.data.shield import Shield
from kimi_jax.data.template import Message, Template
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError, listing


@dataclass(frozen=True, eq=False)
class Example:
    """One document: `tokens`, and for each the weight of *predicting* it (0 for the first)."""

    tokens: Int32[np.ndarray, " T"]
    loss_weights: Float32[np.ndarray, " T"]

    def __post_init__(self) -> None:
        assert self.tokens.dtype == np.int32
        assert self.loss_weights.dtype == np.float32
        assert self.tokens.shape == self.loss_weights.shape == (len(self),)
        assert len(self) > 0
        assert self.loss_weights[0] == 0, "nothing comes before a document's first token"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """Number of tokens with a weight other than 0."""
        return int(np.count_nonzero(self.loss_weights))


@dataclass(frozen=True)
class Span:
    """The part of a conversation that makes one example: messages[:stop], training `trained`."""

    stop: int
    trained: tuple[int, ...]  # indices of the assistant's messages that are learnt


@dataclass(frozen=True)
class Reply:
    """What the model answered, taken apart; `content` includes tool calls in their own notation."""

    reasoning: str
    content: str


def spans(conversation: Conversation) -> list[Span]:
    """The examples that a conversation gives, in order; those with nothing to train left out.

    An example ends with an answer of the assistant that calls no tool, or with the conversation.
    It trains the assistant's messages since the last such answer: they are the ones that the
    model writes with all their reasoning in view. Earlier turns lose their reasoning, so a
    longer conversation does not contain the shorter one and each answer needs its own example.
    """
    messages = conversation.messages
    found = []
    start = 0
    for index, message in enumerate(messages):
        answer = message["role"] == "assistant" and not message.get("tool_calls")
        if answer or index == len(messages) - 1:
            trained = (
                i
                for i in range(start, index + 1)
                if messages[i]["role"] == "assistant" and i not in conversation.untrained
            )
            found.append(Span(index + 1, tuple(trained)))
            start = index + 1
    return [span for span in found if span.trained]


class Chat:
    """Renders and tokenises conversations for one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer = tokenizer
        self.template = template

    @classmethod
    def from_checkpoint(cls, directory: Path, tokenizer: Tokenizer | None = None) -> "Chat":
        """Tokenizer (unless given) and template from the checkpoint's directory."""
        tokenizer = tokenizer or Tokenizer.from_checkpoint(directory)
        return cls(tokenizer, Template.from_checkpoint(directory, tokenizer))

    def examples(self, conversation: Conversation) -> list[Example]:
        """Every example of a conversation, see `spans`. UserError where the template fails."""
        return [self.example(conversation, span) for span in spans(conversation)]

    def example(self, conversation: Conversation, span: Span) -> Example:
        """The tokens of messages[:stop], with weight 1 on what the trained messages must emit.

        That is the body of each: reasoning with its delimiters, content, tool calls and the
        token that ends the turn; not what the generation prompt already writes. Raises UserError
        if the template leaves out a trained message's reasoning or content.
        """
        messages = conversation.messages[: span.stop]
        shield = Shield(self.tokenizer.control_pattern, messages, conversation.tools)
        covered = shield.cover(messages)
        tools = shield.cover(conversation.tools)
        text = self.template.render_open(covered, tools)
        _check_declared(tools, text)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        bodies = self._bodies(text)
        if len(bodies) != len(turns):
            raise UserError(
                f"the chat template rendered {len(bodies)} assistant turns of {len(turns)}; "
                "this conversation cannot be used with it."
            )
        tokens: list[int] = []
        weights: list[float] = []
        done = 0
        for index, (start, end) in zip(turns, bodies, strict=True):
            if index not in span.trained:
                continue
            start = self._behind_prefill(covered[index], text, start, end)
            for part, weight in ((text[done:start], 0.0), (text[start:end], 1.0)):
                ids = self._encode(part, shield)
                tokens += ids
                weights += [weight] * len(ids)
            done = end
        return Example(np.asarray(tokens, np.int32), np.asarray(weights, np.float32))

    def render_prompt(
        self, messages: list[Message], tools: list[Any] | None = None
    ) -> Int32[np.ndarray, " T"]:
        """Tokens of a conversation up to where the assistant begins to write.

        `messages` as in a row of data, ending with the user's or a tool's. Raises UserError with
        every problem of the messages.
        """
        conversation, problems = prompt_problems(messages, tools)
        if conversation is None:
            raise UserError(listing("The prompt's messages cannot be used:", problems))
        shield = Shield(self.tokenizer.control_pattern, conversation.messages, conversation.tools)
        covered, tools = shield.cover(conversation.messages), shield.cover(conversation.tools)
        text = self.template.render(covered, tools, generation_prompt=True)
        _check_declared(tools, text)
        return np.asarray(self._encode(text, shield), np.int32)

    def parse_reply(self, ids: Iterable[int]) -> Reply:
        """Splits generated tokens (behind a prompt) into reasoning and content.

        Everything from the end token on is left out. Reasoning that was not closed, as when the
        reply was cut short, leaves an empty content.
        """
        frame = self.template.frame
        listed = [int(i) for i in ids]
        if self.tokenizer.end_id in listed:
            listed = listed[: listed.index(self.tokenizer.end_id)]
        text = frame.prefill + self.tokenizer.decode(listed)
        if frame.reasoning is None or not text.startswith(frame.reasoning[0]):
            return Reply("", text.removeprefix(frame.prefill))
        before, after = frame.reasoning
        reasoning, _, content = text.removeprefix(before).partition(after)
        return Reply(reasoning, content)

    def _bodies(self, text: str) -> list[tuple[int, int]]:
        """Begin and end (behind the end token) of each assistant turn's body in rendered text."""
        frame = self.template.frame
        found = []
        position = text.find(frame.role)
        while position >= 0:
            start = text.index(frame.middle, position) + len(frame.middle)
            end = text.index(frame.end, start) + len(frame.end)
            found.append((start, end))
            position = text.find(frame.role, end)
        return found

    def _behind_prefill(self, message: Message, text: str, start: int, end: int) -> int:
        """Where the model's own writing begins in a body; checks that nothing was left out."""
        body = text[start:end]
        reasoning = message.get("reasoning_content", "").strip()
        before = (self.template.frame.reasoning or ("", ""))[0]
        kept = body.startswith(before) and body[len(before) :].lstrip().startswith(reasoning)
        if reasoning and not (kept and self.template.frame.reasoning):
            raise _left_out("reasoning_content", reasoning)
        if message["content"].strip() not in body:
            raise _left_out("content", message["content"])
        if message.get("tool_calls") and not self.template.frame.sentinel:
            raise _left_out("tool_calls", message["tool_calls"][0]["id"])
        prefill = self.template.frame.prefill
        if not body.startswith(prefill):
            raise UserError(
                f"the generation prompt begins the assistant's turn with {prefill!r}, but the "
                f"rendered turn begins with {body[:40]!r}; this template cannot be trained on."
            )
        return start + len(prefill)

    def _encode(self, text: str, shield: Shield) -> list[int]:
        """Ids of rendered text: the template's control tokens as such, all else as text."""
        ids: list[int] = []
        done = 0
        for token in self.tokenizer.control_pattern.finditer(text):
            ids += self.tokenizer.encode(shield.uncover(text[done : token.start()]))
            ids.append(self.tokenizer.control[token.group()])
            done = token.end()
        return ids + self.tokenizer.encode(shield.uncover(text[done:]))


def _check_declared(tools: list[Any] | None, text: str) -> None:
    if any(tool["function"]["name"] not in text for tool in tools or []):
        raise UserError("the chat template leaves out the tools; no tools can be used with it.")


def _left_out(field: str, text: str) -> UserError:
    return UserError(
        f"the chat template leaves out the assistant's {field} ({text[:60]!r}), which is to be "
        'learnt. Remove it from the row, or set "train": false on the message.'
    )
