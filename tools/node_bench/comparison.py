"""All ranks beside one alone: where their steps differ, from what both sections recorded."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from tools.step_bench.parts import EXCHANGES, EXPOSED, PARTS

LEAST = 0.001  # seconds: smaller parts are left out


def compare(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Steps of constant rows and their parts; None if one of the two was not measured.

    A rank alone makes copies in place of exchanges, so the difference of the steps is what exchanges,
    and waiting for the busiest rank, cost beyond those copies.
    """
    alone, every = sections.get("rank", {}), sections.get("step", {})
    steps = []
    for how in ("blocked", "one ahead"):
        one, other = _constant(alone, how), _constant(every, how)
        if one and other:
            steps.append(_row("what", f"step, {how}, median", one["median_s"], other["median_s"]))
    if not steps:
        return None
    exact = "parts" in sections.get("breakdown", {}) and "parts" in sections.get(
        "rank_breakdown", {}
    )
    if exact:
        found = (sections["rank_breakdown"], sections["breakdown"])
    else:
        found = (alone.get("usual", {}), every.get("usual", {}))
    return {
        "steps": steps,
        "parts": _parts(*found),
        "of": "without command buffers"
        if exact
        else "as measured: kernels told by their names alone",
        "notes": _notes(alone, every, exact),
    }


def _constant(section: Mapping[str, Any], how: str) -> Mapping[str, Any] | None:
    cases = section.get("cases", [])
    return next(
        (
            case
            for case in cases
            if (case["rows"], case["routing"], case["how"]) == ("constant", "natural", how)
            and "error" not in case
        ),
        None,
    )


def _row(key: str, name: str, alone: float, every: float) -> dict[str, Any]:
    return {key: name, "alone_s": alone, "all_s": every}


def _parts(alone: Mapping[str, Any], every: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All phases of a part together; the largest differences first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for column, found in enumerate((alone, every)):
        for row in found.get("parts", []):
            sums[row["part"]][column] += row["seconds"]
    if not (alone.get("parts") and every.get("parts")):
        return []
    rows = [_row("part", name, *sums[name]) for name in PARTS if name in sums]
    large = [row for row in rows if max(row["alone_s"], row["all_s"]) >= LEAST]
    return sorted(large, key=lambda row: -abs(row["all_s"] - row["alone_s"]))


def _notes(alone: Mapping[str, Any], every: Mapping[str, Any], exact: bool) -> list[str]:
    notes = [
        f"`{EXCHANGES}` are copies in the rank alone; `{EXPOSED}` are exchanges of all ranks while GPU 0 "
        "computed nothing. What runs hidden behind computation can slow it: then that part is larger."
    ]
    if not exact and alone.get("usual"):
        notes.append(
            "Parts are of the programs as measured, whose products cannot be told apart (`not "
            "attributed`); sections breakdown and rank_breakdown together give them all."
        )
    if rows := every.get("overlap"):
        exposed = [row["exposed"] for row in rows]
        hidden = [row["hidden"] for row in rows]
        notes.append(
            f"Traced on {len(rows)} GPUs: exchanges exposed {min(exposed):.3f} to {max(exposed):.3f} s, "
            f"hidden {min(hidden):.3f} to {max(hidden):.3f} s."
        )
    one, other = (_constant(s, "blocked") or {} for s in (alone, every))
    if one.get("loads") and other.get("loads"):
        busiest = max(load["received_to_mean"] for load in other["loads"])
        notes.append(
            f"Assignments, of the mean rank's: {one['loads'][0]['received_to_mean']:.3f} in the rank alone, "
            f"{busiest:.3f} on the busiest of all."
        )
    return notes
