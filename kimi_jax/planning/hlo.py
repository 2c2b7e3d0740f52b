"""Reads a compiled program's text: its collectives, how often they run, and arrays by shape."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Bits of an element; types that are not here do not occur in collectives.
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
# `%name = shape kind(operands…)`; `-start` is the half of an asynchronous pair that counts.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\((.*?)\)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations)=\{?(%[^,}]+(?:, %[^}]+)?)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Array:
    """An element type and a shape, as the program's text has them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * BITS.get(self.dtype, 32) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Collective:
    """An exchange of data. result: what one device gets. runs: times a step, if loops count right."""

    kind: str
    result: tuple[Array, ...]
    runs: int

    @property
    def bytes(self) -> int:
        """Of one device's results in one run."""
        return sum(array.bytes for array in self.result)


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimised program, in the order of its text.

    A loop whose number of turns the compiler does not know counts as one turn.
    """
    runs = _runs(text)
    found = []
    for computation, line in lines(text):
        if match := _COLLECTIVE.search(line):
            shapes, kind, started, _ = match.groups()
            arrays = arrays_in(shapes)
            # A start gives back its operands before its results, in halves.
            arrays = arrays[len(arrays) // 2 :] if started and kind != "all-reduce" else arrays
            found.append(Collective(kind, tuple(arrays), runs.get(computation, 1)))
    return found


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """By kind: how many stand in the program, how often they run in a step, bytes a step."""
    return {
        kind: {
            "count": len(these),
            "runs": sum(one.runs for one in these),
            "bytes": sum(one.runs * one.bytes for one in these),
        }
        for kind in KINDS
        if (these := [one for one in found if one.kind == kind])
    }


def arrays_in(text: str) -> list[Array]:
    """Every array that a piece of program text names."""
    return [
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(text)
        if dtype in BITS
    ]


def results(text: str) -> Counter[tuple[str, Array]]:
    """How often each operation gives back each array, `(operation, array)`; tuples are left out."""
    counted: Counter[tuple[str, Array]] = Counter()
    for _, line in lines(text):
        _, separator, rest = line.partition(" = ")
        if not separator or rest.startswith("("):
            continue
        shape, _, operation = rest.partition(" ")
        for array in arrays_in(shape):
            counted[operation.partition("(")[0], array] += 1
    return counted


def entry_of(text: str) -> str | None:
    """Name of the computation that a program begins with; None: this is no program's text."""
    found = (
        match[2] for line in text.splitlines() if (match := _COMPUTATION.match(line)) and match[1]
    )
    return next(found, None)


def turns(line: str) -> int | None:
    """How often the loop of this line runs its body; None: the compiler does not know."""
    known = _TRIPS.search(line)
    return int(known[1]) if known else None


def lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line, with the name of the computation that it stands in."""
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[2]
        else:
            yield computation, line


def _runs(text: str) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            calls[current] = []
            entry = current if match[1] else entry
            continue
        if called := _CALLED.findall(line):
            known = turns(line) if " while(" in line else None
            times = 1 if known is None else known
            names = [name.strip().lstrip("%") for group in called for name in group.split(",")]
            calls[current] += [(name, times) for name in names]
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for callee, factor in calls.get(name, ()):
            visit(callee, times * factor)

    visit(entry, 1)
    return dict(runs)
