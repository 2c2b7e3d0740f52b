"""The checkpoint's tokenizer: byte-pair ranks and control tokens, from its own files alone."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import tiktoken

from kimi_jax.data.vocabulary import (
    RANKS_FILE,
    RESERVED_IDS,
    TOKENIZER_CONFIG_FILE,
    control_tokens,
    model_settings,
    read_json,
    read_ranks,
)
from kimi_jax.errors import UserError

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_ENGLISH_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# How this family cuts text into pieces before byte pairs are merged; the first alternative that
# matches wins. `&&` is set intersection, which Python's `re` lacks and tiktoken's engine has.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_ENGLISH_ENDING}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_ENGLISH_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# The family's tokenizer cuts text here before it looks for pieces, so a text beyond these sizes
# has other ids when it is left whole.
LONGEST_TEXT = 400_000  # characters
LONGEST_RUN = 25_000  # characters in a row that are all whitespace, or all not

_RUNS = re.compile(r"\s+|\S+")


class Tokenizer:
    """Text to ids and back. Ids below `vocab_size - 256` are text, the rest control tokens."""

    def __init__(
        self,
        ranks: dict[bytes, int],
        control: Mapping[str, int],
        end_id: int,
        name: str,
    ) -> None:
        self._encoding = tiktoken.Encoding(
            name=name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=dict(control)
        )
        self._name = name
        self._text_ids = len(ranks)
        self.control: Mapping[str, int] = dict(control)  # name -> id
        self.end_id = end_id

    @classmethod
    def from_checkpoint(cls, directory: Path, vocab_size: int | None = None) -> "Tokenizer":
        """Builds it from `tiktoken.model`, `tokenizer_config.json` and `config.json`.

        `vocab_size` is the number of rows of the model's embedding; None takes it from
        `config.json`. Raises MissingFileError or UserError where a file is absent, garbled,
        or does not fit the others.
        """
        directory = Path(directory)
        stated_size, end_id = model_settings(directory)
        size = stated_size if vocab_size is None else vocab_size
        ranks = read_ranks(directory / RANKS_FILE)
        source = directory / TOKENIZER_CONFIG_FILE
        control = control_tokens(read_json(source), len(ranks), str(source))
        if len(ranks) + len(control) > size:
            raise UserError(
                f"{directory}: {RANKS_FILE} has {len(ranks)} tokens, {RESERVED_IDS} ids follow for "
                f"control tokens: {len(ranks) + len(control)} in all, but the model's vocab_size is "
                f"{size}. The tokenizer files belong to another model."
            )
        if end_id not in control.values():
            raise UserError(
                f"{directory}: eos_token_id {end_id} is not a control token of this tokenizer "
                f"(those are {len(ranks)} … {len(ranks) + len(control) - 1})."
            )
        return cls(ranks, control, end_id, name=str(directory))

    @property
    def vocab_size(self) -> int:
        """Number of ids: ranks and control tokens (the model's own may be larger)."""
        return self._encoding.n_vocab

    @property
    def end_name(self) -> str:
        """The name of the token that ends a turn."""
        return self.token_bytes(self.end_id).decode()

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token's name, the longest first."""
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. The name of a control token in it stays text: no control id results."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has half of a surrogate pair at character {error.start}; it is not "
                "valid Unicode and cannot be encoded."
            ) from error
        return [i for part in _cuts(text) for i in self._encoding.encode_ordinary(part)]

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, control tokens their names.

        `skip_control` leaves every control token out, also those around reasoning and tool calls
        (`Chat.parse_reply` is what tells reasoning from answer).
        """
        listed = [int(i) for i in ids]
        if skip_control:
            listed = [i for i in listed if not self.is_control(i)]
        return b"".join(map(self.token_bytes, listed)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token (of a control token, its name). UserError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}.")
        return self._encoding.decode_single_token_bytes(token_id)

    def control_id(self, name: str) -> int:
        """Id of the control token called `name`. UserError if this checkpoint has none."""
        if name not in self.control:
            raise UserError(
                f"{self._name}: the tokenizer has no control token {name!r}; its "
                f"{TOKENIZER_CONFIG_FILE} must name it in added_tokens_decoder."
            )
        return self.control[name]

    def is_control(self, token_id: int) -> bool:
        """Whether `token_id` is a control token."""
        return self._text_ids <= token_id < self.vocab_size


def _cuts(text: str) -> Iterator[str]:
    """`text` in parts of at most LONGEST_TEXT characters without a run beyond LONGEST_RUN."""
    for begin in range(0, len(text), LONGEST_TEXT):
        part = text[begin : begin + LONGEST_TEXT]
        start = 0
        if len(part) <= LONGEST_RUN:  # nearly every text
            yield part
            continue
        for run in _RUNS.finditer(part):
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield part[start:cut]
                start = cut
        yield part[start:]
