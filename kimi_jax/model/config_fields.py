"""Typed access to the fields of a JSON object, with every problem collected."""

import math
from collections.abc import Mapping
from typing import Any


class Fields:
    """Typed access to a config's fields that collects problems; a bad field reads as a 1."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def _get(self, key: str, kinds: tuple[type, ...], required: str, default: Any = 1) -> Any:
        if key not in self.raw:
            self.problems.append(f"{key} is missing; required: {required}")
            return default
        value = self.raw[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.problems.append(f"{key} is {value!r}; required: {required}")
            return default
        return value

    def integer(self, key: str, least: int) -> int:
        """An integer of at least `least`; `least` if it is not one."""
        value = self._get(key, (int,), f"an integer of at least {least}", least)
        if value < least:
            self.problems.append(f"{key} is {value}; required: at least {least}")
        return value

    def positive(self, key: str) -> int:
        """An integer of at least 1."""
        return self.integer(key, 1)

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = float(self._get(key, (int, float), "a number above 0"))
        if not (value > 0 and math.isfinite(value)):
            self.problems.append(f"{key} is {value}; required: a number above 0")
        return value

    def boolean(self, key: str) -> bool:
        """True or false."""
        return self._get(key, (bool,), "true or false", default=True)

    def is_null(self, key: str) -> bool:
        """Whether the field is there and says null."""
        return key in self.raw and self.raw[key] is None


def as_object(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}
