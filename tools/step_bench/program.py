"""Where each instruction of a compiled program came from: its operation's path and the source functions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FRAME_OF = re.compile(r"stack_frame_id=(\d+)")
_NAME_ROW = re.compile(r'^(\d+) "(.*)"$')
_LOCATION_ROW = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)")
_FRAME_ROW = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

Frame = tuple[str, str]  # file, qualified name of the function


@dataclass(frozen=True)
class Origin:
    """Of one instruction. operation: its path. frames: innermost first. target: of a custom call."""

    operation: str = ""
    frames: tuple[Frame, ...] = ()
    opcode: str = ""
    target: str = ""


def origins(text: str) -> dict[str, Origin]:
    """Every instruction that carries metadata, by name; `text` is `compiled.as_text()`."""
    frames = _frames(text)
    found = {}
    for line in text.splitlines():
        if " = " not in line or not (match := _INSTRUCTION.match(line)):
            continue
        operation, target = _OP_NAME.search(line), _TARGET.search(line)
        frame = _FRAME_OF.search(line)
        if operation or frame or target:
            found[match[1]] = Origin(
                # Of several that became one instruction, the first.
                operation[1].partition(";")[0] if operation else "",
                frames.get(int(frame[1]), ()) if frame else (),
                match[2],
                target[1] if target else "",
            )
    return found


def by_kernel(known: Mapping[str, Origin]) -> dict[str, Origin]:
    """The same by names of kernels, which have `_` where instructions have `.` or `-`."""
    return {name.replace(".", "_").replace("-", "_"): origin for name, origin in known.items()}


def _frames(text: str) -> dict[int, tuple[Frame, ...]]:
    """Chains of (file, function), innermost first, by the id that instructions name."""
    tables: dict[str, list[str]] = {}
    section = ""
    for line in text.splitlines():
        if line in _SECTIONS:
            section, tables[line] = line, []
        elif section and not line.strip():
            if section == _SECTIONS[-1]:
                break
            section = ""
        elif section:
            tables[section].append(line)
    files, functions = (_names(tables.get(name, [])) for name in _SECTIONS[:2])
    places = {}
    for row in tables.get("FileLocations", []):
        if match := _LOCATION_ROW.match(row):
            number, file, function = map(int, match.groups())
            places[number] = (files.get(file, ""), functions.get(function, ""))
    parents = {}
    for row in tables.get("StackFrames", []):
        if match := _FRAME_ROW.match(row):
            parents[int(match[1])] = (int(match[2]), int(match[3] or 0))
    # Some versions print a parent's id plus one, so that the first frame names itself.
    shift = 1 if any(parent == number for number, (_, parent) in parents.items()) else 0
    chains: dict[int, tuple[Frame, ...]] = {}
    for number in sorted(parents):
        place, parent = parents[number]
        here = places.get(place, ("", ""))
        chains[number] = (here, *chains.get(parent - shift, ()))
    return chains


def _names(rows: list[str]) -> dict[int, str]:
    matches = (_NAME_ROW.match(row) for row in rows)
    return {int(match[1]): match[2] for match in matches if match}
