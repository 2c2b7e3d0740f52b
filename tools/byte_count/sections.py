"""A program's entry and its loops, each with the instructions that move bytes, the largest first."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kimi_jax.planning.hlo import KINDS, Array
from tools.byte_count.counting import CALLING, Traffic, moves_nothing, traffic
from tools.byte_count.program import Computation, Instruction, Program

Group = Literal["compiled", "kernel", "exchange"]
"""Made by the compiler; a custom call, whose bytes are those of its arrays; between devices."""
GROUPS: tuple[Group, ...] = get_args(Group)
IN_WORDS = {"compiled": "compiled", "kernel": "kernels", "exchange": "exchanges"}


@dataclass(frozen=True)
class Row:
    """An instruction, bytes of one run of it. kind: the opcode, and what else tells it apart."""

    name: str
    group: Group
    kind: str
    results: tuple[Array, ...]
    source: str
    moved: Traffic


@dataclass(frozen=True)
class Section:
    """The entry, a loop's body or a conditional's branch.

    Attributes:
        name: of the instruction that runs it, or `entry`.
        computation: its name.
        inside: of which section.
        turns: each time that it is reached; None: the compiler does not know.
        runs: a step, where turns that are not known count as one.
        source: of the instruction that runs it.
        rows: instructions that move bytes, the largest first.
    """

    name: str
    computation: str
    inside: str
    turns: int | None
    runs: int
    source: str
    rows: tuple[Row, ...]

    def total(self, group: Group) -> int:
        """Bytes read and written in one turn."""
        return sum(row.moved.both for row in self.rows if row.group == group)


def sections_of(program: Program) -> list[Section]:
    """The entry first, then what it runs, in the order of the text; all branches count as if taken.

    The conditions of loops do not count.
    """
    return list(_sections(program, program.entry, "entry", "", 1, 1, ""))


def total(sections: Iterable[Section], group: Group) -> int:
    """Bytes read and written in a step."""
    return sum(section.runs * section.total(group) for section in sections)


def seconds(size: int, rate: float) -> float:
    """Time of so many bytes at a rate in TB/s."""
    return size / (rate * 1e12)


def to_json(sections: Iterable[Section], rate: float) -> dict[str, Any]:
    """As what `json.dumps` takes: bytes of a turn, seconds at the rate in TB/s, sums a step."""
    sections = list(sections)
    return {
        "rate_tb_s": rate,
        "bytes_a_step": {group: total(sections, group) for group in GROUPS},
        "sections": [
            {
                "name": section.name,
                "computation": section.computation,
                "inside": section.inside,
                "turns": section.turns,
                "runs": section.runs,
                "source": section.source,
                "bytes": {group: section.total(group) for group in GROUPS},
                "rows": [_row_to_json(row, rate) for row in section.rows],
            }
            for section in sections
        ],
    }


def _row_to_json(row: Row, rate: float) -> dict[str, Any]:
    return {
        "name": row.name,
        "group": row.group,
        "kind": row.kind,
        "results": [str(array) for array in row.results],
        "source": row.source,
        "read": row.moved.read,
        "written": row.moved.written,
        "seconds": seconds(row.moved.both, rate),
    }


def _sections(
    program: Program,
    computation: Computation,
    name: str,
    inside: str,
    turns: int | None,
    runs: int,
    source: str,
) -> Iterator[Section]:
    own = list(_inlined(program, computation))
    rows = [_row(program, where, one) for where, one in own if not moves_nothing(one)]
    rows.sort(key=lambda row: -row.moved.both)
    yield Section(name, computation.name, inside, turns, runs, source, tuple(rows))
    for _, one in own:
        again = one.turns if one.body else 1
        times = runs * (1 if again is None else again)
        for callee in (one.body, *one.branches):
            if callee:
                inner = program.computations[callee]
                yield from _sections(program, inner, one.name, name, again, times, one.source)


def _inlined(
    program: Program, computation: Computation
) -> Iterator[tuple[Computation, Instruction]]:
    """Instructions with where they stand, those of a called computation among them."""
    for one in computation.instructions.values():
        if one.operation == "call":
            if not one.finishes:
                yield from _inlined(program, program.computations[one.called])
        else:
            yield computation, one


def _row(program: Program, computation: Computation, one: Instruction) -> Row:
    opcodes = {one.operation}
    if one.operation in CALLING:
        inner = program.computations[one.called].instructions.values()
        opcodes |= {other.opcode for other in inner}
    exchange = next((kind for kind in KINDS if kind in opcodes), None)
    group: Group = "exchange" if exchange else "kernel" if "custom-call" in opcodes else "compiled"
    kind = exchange or f"{one.operation} {one.detail}".rstrip()
    return Row(
        one.name,
        group,
        kind,
        _results(computation, one),
        one.source,
        traffic(program, computation, one),
    )


def _results(computation: Computation, one: Instruction) -> tuple[Array, ...]:
    """Of an asynchronous pair, what its end gives back."""
    started = one.opcode != one.operation
    return computation.finish(one).results if started else one.results
