"""How much of the time in which one kind of work ran, another ran beside it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Span = tuple[float, float]  # begin and end, from any origin


class Overlap(NamedTuple):
    """Of one device and one step, seconds. What runs side by side with its own kind counts once.

    Attributes:
        span: from the first begin to the last end.
        computed: in which something was computed.
        exchanged: in which an exchange ran, waiting for other ranks included.
        hidden: of that, while something was computed.
        exposed: of that, while nothing was.
        idle: in which neither ran.
    """

    span: float
    computed: float
    exchanged: float
    hidden: float
    exposed: float
    idle: float


def overlap(computing: Iterable[Span], exchanging: Iterable[Span]) -> Overlap:
    """Puts both kinds of spans, in any order and overlapping as they may, beside each other."""
    computed, exchanged = union(computing), union(exchanging)
    every = union((*computed, *exchanged))
    span = every[-1][1] - every[0][0] if every else 0.0
    hidden = common(computed, exchanged)
    busy = length(exchanged)
    return Overlap(
        span, length(computed), busy, hidden, busy - hidden, max(0.0, span - length(every))
    )


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments in spans that neither touch nor overlap, in order."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def common(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Seconds that lie in both, each as `union` gives it."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return total


def length(spans: Iterable[Span]) -> float:
    """Seconds of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)
