"""One traced step, cut into the parts of the model by the kernels that ran."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from tools.step_bench.parts import IDLE, ONCE, PHASES, UNKNOWN, part, phase
from tools.step_bench.program import Origin, by_kernel, origins

# Kernels in a command buffer do not say which instruction launched them: the traced program has none.
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
LISTED = 12  # kernels by time, in the JSON file and for what was not attributed

Key = tuple[str, str]  # part, phase


class Event(NamedTuple):
    """A kernel or a copy. Times in seconds from any origin; instruction: in the program, if known."""

    kernel: str
    start: float
    seconds: float
    instruction: str = ""
    operation: str = ""


@dataclass(frozen=True)
class Breakdown:
    """Of one step, seconds. What ran beside something else counts once, for what began first.

    longest: kernels by time, each with its part, phase and number of calls.
    """

    span: float
    parts: dict[Key, float]
    kernels: int
    longest: list[dict[str, Any]] = field(default_factory=list)

    def of(self, name: str) -> float:
        """All phases of a part."""
        return sum(seconds for (part, _), seconds in self.parts.items() if part == name)

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        rows = [
            {"part": name, "phase": phase, "seconds": seconds}
            for (name, phase), seconds in self.parts.items()
        ]
        return {
            "span_s": self.span,
            "kernels": self.kernels,
            "parts": rows,
            "longest": self.longest,
        }


def traced(step: Callable[[], Any], keep: Path | None = None) -> list[Event]:
    """Runs one step under the profiler; the events of its device, none if there is no GPU."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = keep or Path(temporary)
        jax.profiler.start_trace(str(directory))
        jax.block_until_ready(step())
        jax.profiler.stop_trace()
        newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return events_of(ProfileData.from_file(str(newest)))


def events_of(profile: Any) -> list[Event]:
    """Kernels and copies on the streams of the first GPU."""
    found = []
    for plane in profile.planes:
        if "/device:GPU:0" not in plane.name:
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                stats = dict(event.stats)
                found.append(
                    Event(
                        event.name,
                        event.start_ns / 1e9,
                        event.duration_ns / 1e9,
                        str(stats.get("hlo_op", "")),
                        str(stats.get("name", "")),
                    )
                )
    return found


def break_down(events: Iterable[Event], text: str) -> Breakdown:
    """Seconds by part and phase.

    Args:
        events: of one run, at least one.
        text: the program, `compiled.as_text()`.
    """
    known = origins(text)
    kernels = by_kernel(known)
    sums: dict[Key, float] = defaultdict(float)
    calls: dict[tuple[str, Key], list[float]] = defaultdict(lambda: [0.0, 0])
    ordered = sorted(events, key=lambda event: event.start)
    begin = until = ordered[0].start
    for event in ordered:
        origin = known.get(event.instruction) or kernels.get(event.kernel)
        origin = origin or Origin(event.operation)
        key = (part(origin, event.kernel), phase(origin.operation))
        if event.start > until:
            sums[IDLE, ONCE] += event.start - until
        end = event.start + event.seconds
        alone = max(0.0, end - max(event.start, until))
        until = max(until, end)
        sums[key] += alone
        entry = calls[event.kernel, key]
        entry[0] += alone
        entry[1] += 1
    ranked = sorted(calls.items(), key=lambda item: -item[1][0])
    shown = (
        ranked[:LISTED] + [item for item in ranked[LISTED:] if item[0][1][0] == UNKNOWN][:LISTED]
    )
    longest = [
        {"kernel": name, "part": key[0], "phase": key[1], "seconds": spent, "calls": int(count)}
        for (name, key), (spent, count) in shown
    ]
    ranks = sorted(sums, key=lambda key: (key[0], PHASES.index(key[1])))
    return Breakdown(until - begin, {key: sums[key] for key in ranks}, len(ordered), longest)
