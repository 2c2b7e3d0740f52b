"""A JSONL file as a random-access list of conversations, without holding it in memory."""

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

from kimi_jax.data.row_schema import Conversation, parse_row
from kimi_jax.errors import MissingFileError, UserError, listing

_REMEDY = "Correct these lines; nothing was trained."


class JsonlRows:
    """The rows of a JSONL file, one conversation a line, found by their byte offsets.

    Making one reads the file once, for the offsets and `digest`, the SHA-256 of its bytes; the
    object itself holds eight bytes a row and can be pickled. Raises MissingFileError if the file
    is absent and UserError if it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(
                f"data file {self.path} does not exist. Give a JSONL file: one JSON object a line."
            )
        offsets = array("q", [0])
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for line in file:
                digest.update(line)
                offsets.append(offsets[-1] + len(line))
        if len(offsets) == 1:
            raise UserError(f"data file {self.path} is empty; one JSON object a line is required.")
        self._offsets = offsets
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Conversation:
        """The conversation of row `index`. UserError with all problems of that row."""
        conversation, problems = self.read(index)
        if conversation is None:
            raise UserError(listing("Bad row:", problems))
        return conversation

    def where(self, index: int) -> str:
        """`file:line` of a row, for messages."""
        return f"{self.path}:{index + 1}"

    def read(self, index: int) -> tuple[Conversation | None, list[str]]:
        """The conversation of row `index`, or None and its problems as `file:line: …`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.read(self._offsets[index + 1] - self._offsets[index])
        conversation = None
        try:
            conversation, problems = parse_row(_decode(line))
        except ValueError as error:
            problems = [str(error)]
        return conversation, [f"{self.where(index)}: {problem}" for problem in problems]

    def check(self) -> None:
        """Reads every row. Raises one UserError that lists the problems of all of them."""
        problems = [problem for index in range(len(self)) for problem in self.read(index)[1]]
        if problems:
            raise bad_rows(self.path, problems)


def bad_rows(path: Path, problems: list[str]) -> UserError:
    """The one error for all problems of a data file."""
    return UserError(listing(f"{len(problems)} problems in {path}:", problems, _REMEDY))


def _decode(line: bytes) -> object:
    """One line of JSON. Raises ValueError with what is wrong."""
    if not line.strip():
        raise ValueError("the line is empty; one JSON object a line is required")
    if line.startswith(b"\xef\xbb\xbf"):
        raise ValueError("begins with a byte order mark; save the file as UTF-8 without it")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}") from error
    try:
        return json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from error


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"key {', '.join(repeated)} occurs twice in one object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
