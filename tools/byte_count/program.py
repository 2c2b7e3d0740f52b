"""An optimised program's text as computations of instructions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kimi_jax.errors import UserError, listing
from kimi_jax.planning.hlo import Array, arrays_in, entry_of, lines, turns

START, DONE, UPDATE = "-start", "-done", "-update"

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([\w.\-]+)")
_BODY = re.compile(r"\bbody=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))"
)
_KIND = re.compile(r"\bkind=(\w+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: within its computation.
        opcode: what it does; of the first half of an asynchronous pair with `-start` at its end.
        results: arrays that it gives back.
        operands: names, in order.
        number: of a parameter, else None.
        called: the computation of a fusion, a call or an asynchronous start, if any.
        branches: of a conditional.
        body: of a loop.
        turns: of a loop, if the compiler knows.
        detail: kind of a fusion, target of a custom call.
        source: path of the JAX operation that it came from.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...] = ()
    number: int | None = None
    called: str = ""
    branches: tuple[str, ...] = ()
    body: str = ""
    turns: int | None = None
    detail: str = ""
    source: str = ""

    @property
    def bytes(self) -> int:
        """Of all results."""
        return sum(array.bytes for array in self.results)

    @property
    def operation(self) -> str:
        """The opcode, of a start that of the whole pair."""
        return self.opcode.removesuffix(START)

    @property
    def finishes(self) -> bool:
        """Whether it only waits for, or passes on, what another instruction started."""
        return self.opcode.endswith((DONE, UPDATE))


@dataclass(frozen=True)
class Computation:
    """Instructions by name, and which of them gives the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, position: int) -> Instruction:
        """What an instruction takes at a place."""
        return self.instructions[instruction.operands[position]]

    @cached_property
    def users(self) -> Mapping[str, list[tuple[Instruction, int]]]:
        """Who takes each value, at which place, by the value's name."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, name in enumerate(instruction.operands):
                found[name].append((instruction, position))
        return found

    @cached_property
    def outputs(self) -> tuple[Instruction, ...]:
        """The result's parts: a tuple's, or the root alone."""
        if self.root.opcode != "tuple":
            return (self.root,)
        return tuple(self.instructions[name] for name in self.root.operands)

    @cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """By number."""
        return {i.number: i for i in self.instructions.values() if i.number is not None}

    def finish(self, start: Instruction) -> Instruction:
        """The end of an asynchronous pair, which gives back its result.

        Raises:
            UserError: there is none.
        """
        for user, _ in self.users[start.name]:
            if user.opcode.endswith(DONE):
                return user
            if user.opcode.endswith(UPDATE):
                return self.finish(user)
        raise UserError(
            f"%{start.name} of %{self.name} is started and never done: is the text whole?"
        )


@dataclass(frozen=True)
class Program:
    """Computations by name, and the one that a run begins with."""

    computations: Mapping[str, Computation]
    entry: Computation


def read_program(text: str, name: str) -> Program:
    """The program of a text such as `compiled.as_text()` gives.

    Args:
        text: of the whole program.
        name: of it, for messages.

    Raises:
        UserError: it is not the text of a program, or parts of it are missing.
    """
    entry = entry_of(text)
    found: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, Instruction] = {}
    for computation, line in lines(text):
        if match := _INSTRUCTION.match(line):
            one = _instruction(match[2], match[3])
            if one is not None:
                found.setdefault(computation, {})[one.name] = one
                if match[1]:
                    roots[computation] = one
    if entry is None or entry not in roots:
        raise UserError(
            f"{name}: not the text of an optimised HLO program: it has no ENTRY computation with a ROOT. "
            "Required: what compiled.as_text() gives, as --save writes it"
        )
    missing = sorted(_missing(found, roots))
    if missing:
        raise UserError(listing(f"{name}: the program's text is not whole", missing))
    computations = {
        computation: Computation(computation, instructions, roots[computation])
        for computation, instructions in found.items()
        if computation in roots
    }
    return Program(computations, computations[entry])


def _missing(
    found: Mapping[str, Mapping[str, Instruction]], roots: Mapping[str, Instruction]
) -> set[str]:
    """What instructions name and the text does not have, in words."""
    absent = {f"%{name} has no ROOT" for name in found.keys() - roots.keys()}
    for name, instructions in found.items():
        for one in instructions.values():
            absent |= {
                f"%{operand}, which %{one.name} of %{name} takes"
                for operand in one.operands
                if operand not in instructions
            }
            absent |= {
                f"%{called}, which %{one.name} of %{name} calls"
                for called in (one.called, one.body, *one.branches)
                if called and called not in found
            }
    return absent


def _instruction(name: str, text: str) -> Instruction | None:
    """Of what stands right of `=`; None: not an instruction."""
    end = _closing(text) if text.startswith("(") else text.find(" ")
    match = _OPCODE.match(text, end)
    if end < 0 or not match:
        return None
    opcode = match[1]
    close = _closing(text, match.end() - 1)
    inside, rest = text[match.end() : close - 1], text[close:]
    branches = [
        branch
        for group in _BRANCHES.findall(rest)
        for part in group
        for branch in _OPERAND.findall(part)
    ]
    target = _TARGET if opcode.startswith("custom-call") else _KIND
    return Instruction(
        name,
        opcode,
        tuple(arrays_in(text[:end])),
        () if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(inside)),
        number=int(inside) if opcode == "parameter" else None,
        called=_first(_CALLED, rest),
        branches=tuple(branches),
        body=_first(_BODY, rest),
        turns=turns(rest) if opcode == "while" else None,
        detail=_first(target, rest),
        source=_first(_SOURCE, rest),
    )


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _closing(text: str, begin: int = 0) -> int:
    """Just behind the bracket that closes the one at `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)
