"""One traced step, cut into the parts of the model by the kernels that ran."""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from tools.step_bench.overlap import Overlap, Span, common, length, overlap, union
from tools.step_bench.parts import EXPOSED, HOST, IDLE, ONCE, PHASES, UNKNOWN, part, phase
from tools.step_bench.program import Origin, by_kernel, origins

# Kernels in a command buffer do not say which instruction launched them: the traced program has none.
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
LISTED = 12  # kernels by time, in the JSON file and for what was not attributed
OF_EACH = 4  # of every part, at least, if it has as many

_DEVICE = re.compile(r"/device:GPU:(\d+)")
# NCCL's kernels, XLA's own, and copies from one GPU to another by the copy engines; and instructions, by
# the compiler's names or by those of JAX's operations.
_KINDS = r"all[-_]?gather|all[-_]?reduce|reduce[-_]?scatter|all[-_]?to[-_]?all|collective"
_EXCHANGE = re.compile(rf"nccl|{_KINDS}|memcpy_?p(2p|eer)", re.IGNORECASE)
_EXCHANGING = re.compile(rf"({_KINDS}|psum|pmax|ppermute)")
_HOST_COPY = re.compile(r"memcpy_?(d2h|h2d|dtoh|htod)", re.IGNORECASE)
_FUSION = re.compile(r"fusion[\w.]*$")  # computes, whatever it is called after

Key = tuple[str, str]  # part, phase


class Event(NamedTuple):
    """A kernel or a copy. Times in seconds from any origin; instruction: in the program, if known."""

    kernel: str
    start: float
    seconds: float
    instruction: str = ""
    operation: str = ""

    @property
    def span(self) -> Span:
        """Begin and end."""
        return self.start, self.start + self.seconds


@dataclass(frozen=True)
class Breakdown:
    """Of one step, seconds. What ran beside something else counts once, for what began first.

    An exchange between GPUs counts where nothing else ran, as `parts.EXPOSED`, and what travels between a
    GPU and the host where neither did, as `parts.HOST`. longest: kernels by time, each with its part, phase
    and number of calls. travelled: seconds in which copies between the GPU and the host ran, by the
    direction's name, beside whatever ran.
    """

    span: float
    parts: dict[Key, float]
    kernels: int
    longest: list[dict[str, Any]] = field(default_factory=list)
    travelled: dict[str, float] = field(default_factory=dict)

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
            "travelled_s": self.travelled,
        }


def traced(step: Callable[[], Any], keep: Path | None = None) -> dict[int, list[Event]]:
    """Runs one step under the profiler; the events of each GPU by its number, none if there is none."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = keep or Path(temporary)
        jax.profiler.start_trace(str(directory))
        jax.block_until_ready(step())
        jax.profiler.stop_trace()
        newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return events_of(ProfileData.from_file(str(newest)))


def events_of(profile: Any) -> dict[int, list[Event]]:
    """Kernels and copies on the streams of each GPU, by its number."""
    by_device: dict[int, list[Event]] = {}
    for plane in profile.planes:
        if not (device := _DEVICE.search(plane.name)):
            continue
        found = by_device.setdefault(int(device[1]), [])
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
    return {number: found for number, found in sorted(by_device.items()) if found}


def is_exchange(event: Event) -> bool:
    """Whether an event moves data from one GPU to another."""
    if _FUSION.search(event.kernel) or _FUSION.search(event.instruction):
        return False
    return bool(_EXCHANGING.match(event.instruction) or _EXCHANGE.search(event.kernel))


class _Kinds(NamedTuple):
    """Events of one GPU, in the order they were given."""

    computing: list[Event]
    exchanging: list[Event]
    travelling: list[Event]


def _told_apart(events: Iterable[Event]) -> _Kinds:
    """What computes, what moves data from one GPU to another, and what between a GPU and the host."""
    kinds = _Kinds([], [], [])
    for event in events:
        if is_exchange(event):
            kinds.exchanging.append(event)
        elif _HOST_COPY.search(event.kernel):
            kinds.travelling.append(event)
        else:
            kinds.computing.append(event)
    return kinds


def exchanges(events: Iterable[Event]) -> tuple[Overlap, dict[str, tuple[float, int]]]:
    """What of a GPU's exchanges is hidden behind its computation; seconds and calls of their kernels."""
    computing, exchanging, _ = _told_apart(events)
    kernels: dict[str, tuple[float, int]] = {}
    for event in exchanging:
        spent, calls = kernels.get(event.kernel, (0.0, 0))
        kernels[event.kernel] = (spent + event.seconds, calls + 1)
    return overlap((e.span for e in computing), (e.span for e in exchanging)), kernels


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
    gaps: list[Span] = []
    kinds = _told_apart(ordered)
    exchanging = union(event.span for event in kinds.exchanging)
    apart = union((*exchanging, *(event.span for event in kinds.travelling)))
    for event in kinds.computing:
        origin = known.get(event.instruction) or kernels.get(event.kernel)
        origin = origin or Origin(event.operation)
        key = (part(origin, event.kernel), phase(origin.operation))
        if event.start > until:
            gaps.append((until, event.start))
        end = event.start + event.seconds
        alone = max(0.0, end - max(event.start, until))
        until = max(until, end)
        sums[key] += alone
        entry = calls[event.kernel, key]
        entry[0] += alone
        entry[1] += 1
    last = max(until, apart[-1][1]) if apart else until
    gaps.append((until, last))
    exposed, unhidden = common(gaps, exchanging), common(gaps, apart)
    if exchanging:
        sums[EXPOSED, ONCE] = exposed
    if unhidden > exposed:
        sums[HOST, ONCE] = unhidden - exposed
    if idle := length(gaps) - unhidden:
        sums[IDLE, ONCE] = idle
    ranked = sorted(calls.items(), key=lambda item: -item[1][0])
    seen: Counter[str] = Counter()
    shown = []
    for number, item in enumerate(ranked):
        name = item[0][1][0]
        if number < LISTED or seen[name] < (LISTED if name == UNKNOWN else OF_EACH):
            shown.append(item)
        seen[name] += 1
    longest = [
        {"kernel": name, "part": key[0], "phase": key[1], "seconds": spent, "calls": int(count)}
        for (name, key), (spent, count) in shown
    ]
    ranks = sorted(sums, key=lambda key: (key[0], PHASES.index(key[1])))
    directions = sorted({event.kernel for event in kinds.travelling})
    travelled = {
        name: length(union(e.span for e in kinds.travelling if e.kernel == name))
        for name in directions
    }
    return Breakdown(
        last - begin, {key: sums[key] for key in ranks}, len(ordered), longest, travelled
    )
