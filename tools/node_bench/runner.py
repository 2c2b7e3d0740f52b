"""Runs the sections in processes of their own, so that none can take another's memory or results along.

This process never touches a device. A worker's memory is free for certain when it has ended, a crash ends
one worker alone, and the file of results has what was found until then.
"""

import subprocess
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console

from tools.node_bench.record import FAILED, NOT_RUN, RUNNING, SICK, STOPPED, Record
from tools.step_bench.machine import seconds_since_start

RANK, MESH, IMPORT = "rank", "mesh", "import"
WRITE = "write"
COMPILE, COMPILE_TRACED = "compile", "compile_traced"
WORKERS = {
    "rank": RANK,
    "rank_breakdown": RANK,
    "step": MESH,
    "breakdown": MESH,
    "checkpoint": MESH,
    "decode": MESH,
    "import": IMPORT,
}
"""The kind of process that a section runs in. Sections that follow each other share one."""
PREPARED = {IMPORT: (WRITE,), MESH: (COMPILE, COMPILE_TRACED)}
"""What a kind of process may want done before it: by processes that can run beside a rank alone."""
PATIENCE = 10.0  # seconds that a stopped worker gets to end by itself

Start = Callable[[Sequence[str]], "subprocess.Popen[bytes]"]
"""Starts a worker for sections, or for something of `PREPARED`."""


class Runner:
    """Workers one after the other, until the limit."""

    def __init__(self, start: Start, limit: float, record: Record, console: Console) -> None:
        """Keeps what it is given.

        Args:
            start: of a worker.
            limit: seconds after this process's creation at which no worker runs any more.
            record: of the results; workers write it, one at a time.
            console: for what went wrong.
        """
        self.start, self.limit = start, limit
        self.record, self.console = record, console
        self.beside: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - seconds_since_start()

    def run(self, sections: Sequence[str], prepare: Sequence[str] = ()) -> None:
        """Runs sections in this order.

        Args:
            sections: names from `WORKERS`.
            prepare: of `PREPARED`, what is wanted: `write`, a checkpoint for the import, and the two
                programs of the step into the compilation cache. They take cores and no GPU to speak
                of, so they begin at once if a rank alone comes first, which compiles for a minute itself.
        """
        for name in sections:
            self.record.section(name)
        self.record.save()
        groups = [(kind, list(names)) for kind, names in groupby(sections, WORKERS.__getitem__)]
        try:
            if groups[0][0] == RANK:
                for kind, _ in groups:
                    self.begin(kind, prepare)
            for kind, names in groups:
                if kind == IMPORT:  # the step would compile as fast by itself
                    self.begin(kind, prepare)
                if kind != RANK:  # nothing is measured beside them
                    for process in self.beside.values():
                        self.wait(process)
                self.group(names)
        finally:
            for process in self.beside.values():
                if process.poll() is None:
                    self.stop(process)

    def begin(self, kind: str, prepare: Sequence[str]) -> None:
        """Starts what is wanted before this kind of process, unless it was."""
        for what in PREPARED.get(kind, ()):
            if what in prepare and what not in self.beside and self.left > 0:
                self.beside[what] = self.start([what])

    def group(self, names: Sequence[str]) -> None:
        """Runs sections that share a worker; another follows if it died at one of several."""
        left = list(names)
        while left:
            before, left = left, self.some(left)
            if left == before:
                self.mark(left, {NOT_RUN}, FAILED, "its process ended before it began")
                return

    def some(self, names: Sequence[str]) -> list[str]:
        """Runs sections in one worker, and notes what became of them; returns those left to do."""
        if self.left <= 0:
            self.mark(names, {NOT_RUN}, NOT_RUN, "the limit was reached before")
            return []
        worker = self.start(names)
        try:
            code = self.wait(worker)
        except BaseException:
            self.stop(worker)
            raise
        self.record.load()
        if code is None:
            reason = f"the limit of {self.limit:.0f} s was reached"
            self.mark(names, {RUNNING}, STOPPED, reason)
            self.mark(names, {NOT_RUN}, NOT_RUN, reason)
            return []
        if code not in (0, SICK):
            self.mark(names, {RUNNING}, FAILED, f"its process ended with code {code}")
        return [name for name in names if self.record.section(name)["state"] == NOT_RUN]

    def wait(self, worker: "subprocess.Popen[bytes]") -> int | None:
        """The exit code of a worker, which is stopped at the limit: then None."""
        try:
            return worker.wait(timeout=max(0.0, self.left))
        except subprocess.TimeoutExpired:
            self.stop(worker)
            return None

    def stop(self, worker: "subprocess.Popen[bytes]") -> None:
        """Ends a worker."""
        worker.terminate()
        try:
            worker.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()

    def mark(self, names: Sequence[str], states: set[str], state: str, reason: str) -> None:
        """Puts those of the sections that are in one of `states` into another."""
        for name in names:
            found = self.record.section(name)
            if found["state"] in states:
                found |= {"state": state, "reason": reason}
                self.console.print(f"{name}: {state}: {reason}", markup=False)
        self.record.save()
