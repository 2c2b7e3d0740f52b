"""Every example of a data file: expanded, checked and measured before the first step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32

from kimi_jax.data.chat import Chat, Example, spans
from kimi_jax.data.rows import JsonlRows, bad_rows
from kimi_jax.errors import UserError, listing

Overlong = Literal["error", "drop", "truncate"]

_CACHED_TOKENS = 1 << 25  # kept tokenised: at eight bytes a token, 256 MiB of host memory


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a data file."""

    rows: int
    untrained_rows: int  # rows whose every assistant message is marked `"train": false`
    examples: int
    dropped: int  # overlong examples left out
    truncated: int  # overlong examples cut at the sequence length
    tokens: int
    trained_tokens: int


class Examples:
    """A list of examples, each at most `sequence_length` tokens long.

    One row gives an example for each answer (see `chat.spans`), so the rows are expanded up
    front. That pass renders and tokenises everything, and raises one UserError that lists every
    bad row with its line. An example longer than `sequence_length` is an error, is dropped, or
    is cut there, as `overlong` says; `counts` tells how many. One that is left without a trained
    token by the cut is dropped.

    `progress` is told the number of rows done as it grows: the pass takes about a millisecond a
    row. `lengths` is int32 [examples]. `fingerprint` identifies the examples and their order.
    """

    def __init__(
        self,
        rows: JsonlRows,
        chat: Chat,
        sequence_length: int,
        overlong: Overlong = "error",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if sequence_length < 2:
            raise UserError(f"sequence_length is {sequence_length}; at least 2 is required.")
        if overlong not in get_args(Overlong):
            raise UserError(
                f"data.overlong is {overlong!r}; it must be one of {', '.join(get_args(Overlong))}."
            )
        self._rows = rows
        self._chat = chat
        self.sequence_length = sequence_length
        self._cache: dict[int, Example] = {}
        self._places: list[tuple[int, int]] = []  # row, number of the span in it
        self.counts = self._expand(overlong, progress or (lambda done: None))
        self.fingerprint = _fingerprint(
            rows.digest,
            chat.template.source,
            str(sorted(chat.tokenizer.control.items())),
            f"{chat.tokenizer.vocab_size} {sequence_length} {overlong}",
        )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """Example `index`, tokenised now if it is not kept in memory."""
        if index in self._cache:
            return self._cache[index]
        row, number = self._places[index]
        conversation = self._rows[row]
        example = self._chat.example(conversation, spans(conversation)[number])
        return _cut(example, self.sequence_length)

    def prompt(self, index: int) -> Int32[np.ndarray, " T"]:
        """Tokens of example `index` up to the first that is trained: what the model answers to."""
        example = self[index]
        return example.tokens[: int(np.argmax(example.loss_weights > 0))]

    def question(self, index: int) -> str:
        """The text of the last message before the first trained one of example `index`, to show."""
        row, number = self._places[index]
        conversation = self._rows[row]
        first = spans(conversation)[number].trained[0]
        return str(conversation.messages[first - 1]["content"]) if first else ""

    def where(self, index: int) -> str:
        """`file:line` of the row that example `index` comes from."""
        return self._rows.where(self._places[index][0])

    def _expand(self, overlong: Overlong, progress: Callable[[int], None]) -> Counts:
        problems: list[str] = []
        too_long: list[str] = []
        lengths: list[int] = []
        untrained_rows = dropped = truncated = cached = trained_tokens = 0
        for row in range(len(self._rows)):
            progress(row)
            conversation, found = self._rows.read(row)
            problems += found
            if conversation is None:
                continue
            try:
                examples = self._chat.examples(conversation)
            except UserError as error:
                problems.append(f"{self._rows.where(row)}: {error}")
                continue
            untrained_rows += not examples
            for number, example in enumerate(examples):
                if len(example) > self.sequence_length:
                    too_long.append(f"{self._rows.where(row)}: {len(example)} tokens")
                    example = _cut(example, self.sequence_length)
                    if overlong == "drop" or not example.trained:
                        dropped += 1
                        continue
                    truncated += 1
                if cached + len(example) <= _CACHED_TOKENS:
                    self._cache[len(self._places)] = example
                    cached += len(example)
                self._places.append((row, number))
                lengths.append(len(example))
                trained_tokens += example.trained
        progress(len(self._rows))
        if problems:
            raise bad_rows(self._rows.path, problems)
        if too_long and overlong == "error":
            raise UserError(
                listing(
                    f"{len(too_long)} examples in {self._rows.path} are longer than "
                    f"train.sequence_length {self.sequence_length}:",
                    too_long,
                    'Raise train.sequence_length, or set data.overlong to "drop" or "truncate".',
                )
            )
        if not self._places:
            raise UserError(
                f"{self._rows.path}: nothing to train on. Of {len(self._rows)} rows, "
                f'{untrained_rows} mark every answer "train": false; {dropped} overlong examples '
                "were left out."
            )
        self.lengths: Int32[np.ndarray, " examples"] = np.asarray(lengths, np.int32)
        return Counts(
            rows=len(self._rows),
            untrained_rows=untrained_rows,
            examples=len(self._places),
            dropped=dropped,
            truncated=truncated,
            tokens=sum(lengths),
            trained_tokens=trained_tokens,
        )


def _cut(example: Example, length: int) -> Example:
    if len(example) <= length:
        return example
    return Example(example.tokens[:length], example.loss_weights[:length])


def _fingerprint(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()
