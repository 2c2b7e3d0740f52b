"""What was counted, as lines to read and to search."""

from collections.abc import Iterator, Sequence

from tools.byte_count.sections import GROUPS, IN_WORDS, Row, Section, seconds, total

MB = 1e6
SHAPES, SOURCE = 90, 110  # characters; the JSON file has all
HEADER = f"{'read MB':>9} {'written':>9} {'µs':>8}  {'kind':<26} {'name':<44} shapes | source"
NOTE = (
    "Bytes are upper bounds, counted from the program's text and not measured. Kernels are custom calls: "
    "every array counts whole and once, whatever they skip or read again. An exchange's time is that of "
    "its bytes in this GPU's memory, not on their way."
)


def report(sections: Sequence[Section], least: float, rate: float) -> Iterator[str]:
    """All sections and the sums of a step.

    Args:
        sections: of a program.
        least: MB of the smallest instruction to list.
        rate: TB/s, for the times.
    """
    for section in sections:
        yield from _section(section, least, rate)
    yield "A step:"
    for group in GROUPS:
        if size := total(sections, group):
            yield f"  {IN_WORDS[group]:<10} {_amount(size, rate)}"
    if guessed := _guessed(sections):
        size = sum(total(guessed, group) for group in GROUPS)
        names = ", ".join(section.name for section in guessed)
        yield (
            f"Of it {_amount(size, rate)} in loops whose turns the compiler does not know, each counted as "
            f"one turn where it may be none or many: {names}."
        )
    yield NOTE


def _section(section: Section, least: float, rate: float) -> Iterator[str]:
    yield _title(section)
    listed = [row for row in section.rows if row.moved.both >= least * MB]
    for kernels in (False, True):
        rows = [row for row in listed if (row.group == "kernel") == kernels]
        if rows:
            yield f"{HEADER}{' (kernels)' if kernels else ''}"
            yield from (_row(row, rate) for row in rows)
    for group in GROUPS:
        if count := sum(row.group == group for row in section.rows):
            yield f"  {IN_WORDS[group]:<10} {_amount(section.total(group), rate)} a turn, {count} of them"
    if hidden := len(section.rows) - len(listed):
        yield f"  {hidden} below {least:g} MB are not listed"
    yield ""


def _guessed(sections: Sequence[Section]) -> list[Section]:
    """Loops with turns that are not known, and what stands in them."""
    found: list[Section] = []
    for section in sections:  # what stands in another comes after it
        if section.turns is None or section.inside in {one.name for one in found}:
            found.append(section)
    return found


def _title(section: Section) -> str:
    if not section.inside:
        return f"== {section.name} ({section.computation}): once"
    often = "turns unknown" if section.turns is None else f"{section.turns} turns"
    return (
        f"== {section.name} ({section.computation}) in {section.inside}: {often}, "
        f"{section.runs} a step | {section.source}"
    )


def _row(row: Row, rate: float) -> str:
    read, written = row.moved
    shapes = " ".join(map(str, row.results))
    return (
        f"{read / MB:9.1f} {written / MB:9.1f} {seconds(row.moved.both, rate) * 1e6:8.1f}  "
        f"{row.kind:<26} {row.name:<44} {_cut(shapes, SHAPES)} | {_cut(row.source, -SOURCE)}"
    )


def _cut(text: str, most: int) -> str:
    """At most so many characters of the beginning, or of the end if negative."""
    if len(text) <= abs(most):
        return text
    return f"{text[: most - 1]}…" if most > 0 else f"…{text[most + 1 :]}"


def _amount(size: int, rate: float) -> str:
    return f"{size / MB:,.0f} MB, {seconds(size, rate) * 1e3:.3f} ms"
