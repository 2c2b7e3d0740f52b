"""What was measured so far, in a JSON file that is rewritten as a whole each time something is added."""

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kimi_jax.errors import UserError
from tools.step_bench.machine import seconds_since_start

NOT_RUN, RUNNING, DONE, SKIPPED = "not run", "running", "done", "skipped"
FAILED, STOPPED = "failed", "stopped"
WRONG = (FAILED, STOPPED)  # what makes the whole measurement fail
SICK = 75  # exit code of a process whose devices may not be well any more, with sections left to do

Section = Callable[[dict[str, Any]], None]
"""Measures, and puts what it finds into the dictionary. Whoever has the record may save it in between."""


class Skipped(Exception):  # noqa: N818 (nothing went wrong)
    """A section cannot be measured here; the message is the reason."""


class Record:
    """Everything measured, by section. Only one process at a time may have it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {"sections": {}}
        self.load()

    def load(self) -> None:
        """Takes what the file has, if there is one."""
        if self.path.is_file():
            self.values = json.loads(self.path.read_text(encoding="utf-8"))

    def save(self) -> None:
        """Writes the file anew, beside its name, so that it is whole at every moment."""
        written = self.path.with_name(self.path.name + ".new")
        written.write_text(json.dumps(self.values, indent=1, default=_plain), encoding="utf-8")
        written.replace(self.path)

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """Each with its `state`, and what was found."""
        return self.values["sections"]

    def section(self, name: str) -> dict[str, Any]:
        """Of this name; it has not been run if it is new."""
        return self.sections.setdefault(name, {"state": NOT_RUN})


def run_sections(
    names: Sequence[str], functions: Mapping[str, Section], record: Record, console: Console
) -> int:
    """Runs sections one after the other; what one raises is printed and recorded, and the next begins.

    Returns an exit code: `SICK` if a device failed at one of them, in a way that may spoil what follows in
    this process. Those that follow are not begun then.
    """
    for number, name in enumerate(names, start=1):
        found = record.section(name)
        found["state"] = RUNNING
        record.save()
        console.rule(f"{name}, {seconds_since_start():.0f} s after this process began")
        began = time.perf_counter()
        try:
            functions[name](found)
            found["state"] = DONE
        except Skipped as reason:
            found |= {"state": SKIPPED, "reason": str(reason)}
            console.print(f"{name} was skipped: {reason}", markup=False)
        except Exception as error:
            found |= {"state": FAILED} | told(error)
            refused = isinstance(error, UserError)
            print(str(error) if refused else found["traceback"], flush=True)
        found["seconds"] = time.perf_counter() - began
        record.save()
        if number < len(names) and _sick(found.get("error", "")):
            console.print("A device failed: the rest is measured in a new process.")
            return SICK
    return 0


def told(error: BaseException) -> dict[str, str]:
    """An error in one line, and where it came from."""
    first = str(error).strip().split("\n")[0][:500]
    return {
        "error": f"{type(error).__name__}: {first}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def _sick(error: str) -> bool:
    """Whether an error is the runtime's, and not only too little memory."""
    return "JaxRuntimeError" in error and "RESOURCE_EXHAUSTED" not in error


def _plain(value: Any) -> Any:
    """A NumPy scalar or array, or a path, as what JSON knows."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
