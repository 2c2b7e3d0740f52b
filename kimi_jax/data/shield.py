"""Keeps the names of control tokens in users' text from becoming control tokens.

A chat template writes control tokens and users' text into one string. Before it does, each
control token's name in users' text is replaced by a character that occurs nowhere else; after the
string has been split at the control tokens that the template wrote, the names are put back.
"""

import re
from collections.abc import Iterator
from typing import Any

_STAND_INS = range(0x100000, 0x10FFFC)  # a plane of private-use characters, without its last few


class Shield:
    """Replaces and restores control tokens' names in the strings of some JSON values."""

    def __init__(self, control_pattern: re.Pattern[str], *values: object) -> None:
        strings = [text for value in values for text in _strings(value)]
        found = sorted({name for text in strings for name in control_pattern.findall(text)})
        self._pattern = control_pattern
        self._stand_in: dict[str, str] = {}
        if found:
            used = set().union(*strings)
            free = (chr(code) for code in _STAND_INS if chr(code) not in used)
            self._stand_in = dict(zip(found, free, strict=False))
            assert len(self._stand_in) == len(found), "no private-use character is free"
        self._name = {character: name for name, character in self._stand_in.items()}
        self._restore = re.compile("|".join(self._name) or "(?!)")

    def cover(self, value: Any) -> Any:
        """A copy of a JSON value whose strings (keys too) hold no control token's name."""
        if not self._stand_in:
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._stand_in[match.group()], value)
        if isinstance(value, dict):
            return {self.cover(key): self.cover(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.cover(entry) for entry in value]
        return value

    def uncover(self, text: str) -> str:
        """`text` with the names put back."""
        return self._restore.sub(lambda match: self._name[match.group()], text)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
