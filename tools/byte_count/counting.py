"""Bytes that an instruction reads from memory and writes to it.

Every array that an instruction takes or gives back counts once, whole, save where the program says that
less of it is touched: a slice or a gather reads what it gives back; an update in place writes what it
puts in and leaves the rest alone; a fusion reads of a parameter what the instructions in it take. These
stay upper bounds: pieces that overlap are added up (to the whole at most), and of a kernel (a custom
call) nobody knows what it skips, or reads again. Caches are not thought of, nor the lines of memory
that a small piece fills badly.
"""

from dataclasses import replace
from typing import NamedTuple

from tools.byte_count.program import START, Computation, Instruction, Program

# Give back another view of what exists, or control what runs; what they run is counted by itself.
FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
        "after-all", "add-dependency", "opt-barrier", "domain", "partition-id", "replica-id",
    }
)  # fmt: skip
ROOM = "AllocateBuffer"  # a custom call that gives memory and leaves in it what was there
PIECES = frozenset({"slice", "dynamic-slice", "gather"})
# In place, the operand that holds what is put in.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# One element for one: of what they take is read what of theirs is read.
VIEWS = frozenset({"bitcast", "reshape", "transpose", "convert", "copy"})
CALLING = frozenset({"fusion", "async"})


class Traffic(NamedTuple):
    """Bytes of one run of an instruction."""

    read: int
    written: int

    @property
    def both(self) -> int:
        """Read and written."""
        return self.read + self.written


def moves_nothing(instruction: Instruction) -> bool:
    """Whether an instruction has no bytes of its own to count."""
    return (
        instruction.operation in FREE
        or instruction.finishes
        or (instruction.opcode == "custom-call" and instruction.detail == ROOM)
    )


def traffic(program: Program, computation: Computation, instruction: Instruction) -> Traffic:
    """Of an instruction that is not in a fusion; of an asynchronous pair all stands at its start."""
    if moves_nothing(instruction):
        return Traffic(0, 0)
    if instruction.opcode.endswith(START):
        done = computation.finish(instruction)
        instruction = replace(instruction, opcode=instruction.operation, results=done.results)
    read: dict[str, int] = {}
    for position, name in enumerate(instruction.operands):
        taken = _taken(program, computation, instruction, position, alone=True)
        # What is taken at two places is one array.
        read[name] = min(read.get(name, 0) + taken, computation.instructions[name].bytes)
    return Traffic(sum(read.values()), _written(program, computation, instruction))


def _written(program: Program, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode in CALLING:
        inner = program.computations[instruction.called]
        return sum(_output(program, inner, output) for output in inner.outputs)
    if _updates(instruction):
        return computation.operand(instruction, UPDATES[instruction.opcode]).bytes
    return instruction.bytes


def _output(program: Program, computation: Computation, output: Instruction) -> int:
    """Bytes written for one output of a fusion."""
    source = _seen_through(computation, output)
    if source.opcode in CALLING:
        return _written(program, computation, source)
    if _in_place(computation, source):
        return computation.operand(source, UPDATES[source.opcode]).bytes
    return output.bytes


def _read(program: Program, computation: Computation, value: Instruction) -> int:
    """Bytes of a value that its users in a fusion read."""
    taken = value.bytes if value in computation.outputs else 0
    for user, position in computation.users[value.name]:
        taken += _taken(program, computation, user, position)
    return min(taken, value.bytes)


def _taken(
    program: Program,
    computation: Computation,
    user: Instruction,
    position: int,
    alone: bool = False,
) -> int:
    """Bytes of its operand at a place that an instruction reads; alone: it is not in a fusion."""
    value = computation.operand(user, position)
    if user.opcode in CALLING:
        inner = program.computations[user.called]
        return _read(program, inner, inner.parameters[position])
    if user.opcode in PIECES and position == 0:
        return min(user.bytes, value.bytes)
    if position == 0 and _updates(user) and (alone or _in_place(computation, user)):
        # A slice is written over; a scatter adds to what was there.
        changed = computation.operand(user, UPDATES[user.opcode]).bytes
        return changed if user.opcode == "scatter" else 0
    if not alone and user.opcode in VIEWS and user.bytes:
        return -(-_read(program, computation, user) * value.bytes // user.bytes)
    if not alone and user.opcode == "tuple":
        return 0  # an output, and counted as such
    return value.bytes


def _in_place(computation: Computation, instruction: Instruction) -> bool:
    """Whether a fusion's instruction changes a part of one of its parameters and gives back the whole."""
    if not _updates(instruction):
        return False
    whole = _seen_through(computation, computation.operand(instruction, 0))
    given = [_seen_through(computation, output) for output in computation.outputs]
    return whole.opcode == "parameter" and instruction in given


def _updates(instruction: Instruction) -> bool:
    """Whether it changes a part of its first operand; a scatter into several arrays counts whole."""
    put_in = UPDATES.get(instruction.opcode)
    return put_in is not None and (
        instruction.opcode != "scatter" or len(instruction.operands) == 3
    )


def _seen_through(computation: Computation, value: Instruction) -> Instruction:
    """What a bitcast is of."""
    while value.opcode == "bitcast":
        value = computation.operand(value, 0)
    return value
