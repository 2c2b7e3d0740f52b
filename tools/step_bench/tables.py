"""What was measured, as tables for people."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.step_bench import parts
from tools.step_bench.exchange import Traffic, project
from tools.step_bench.floors import total
from tools.step_bench.machine import DATASHEET, Startup
from tools.step_bench.measuring import Bench, Measured, Traced

GIB = 2**30


def print_cases(console: Console, bench: Bench, measured: list[Measured]) -> None:
    """Speed and memory of one row length."""
    rank = bench.rank
    table = _table(
        f"{rank.model.num_hidden_layers} layers, {rank.rows} × {rank.length} tokens on this GPU",
        ("routing, rows", "fastest s", "median s", "real tokens/s", "MFU 4N", "with recompute"),
        ("assignments/mean", "passes", "experts' loads/mean", "padding"),
    )
    for one in measured:
        load = one.loads
        table.add_row(
            one.name,
            f"{one.best:.3f}",
            f"{statistics.median(one.seconds):.3f}",
            f"{one.tokens_a_second:,.0f}",
            f"{one.mfu['4N']:.1%}",
            f"{one.mfu['with_recompute']:.1%}",
            f"{load.ratio:.3f} ({_span(load.received / load.mean)})",
            f"{load.passes.mean():.2f} (≤ {load.passes.max():.0f})" if load.passes.size else "-",
            f"{load.idlest:.2f}-{load.busiest:.1f}",
            f"{1 - one.case.real_tokens / one.case.batch['tokens'].size:.1%}",
        )
    console.print(table)
    console.print(
        f"MFU: of {DATASHEET / 1e12:.0f} TFLOP/s, the H200's datasheet. Assignments: to this rank's experts, "
        "of the mean rank's (layer by layer in brackets); below 1 the tokens/s are flattered. Padding's are "
        f"not in it. First step of this program: {bench.first:.3f} s."
    )
    peak = max((one.peak for one in measured), default=0)
    text = f"Memory: compiler {bench.report.total / GIB:.2f} GiB, plan {bench.plan.program / GIB:.2f} GiB"
    seen = f"peak so far {peak / GIB:.2f} GiB, before steps {bench.standing / GIB:.2f} GiB"
    console.print(f"{text}; {seen if peak else 'no peak: this device does not count'}.")
    console.print(bench.report.implementation)
    if not all(one.finite for one in measured):
        console.print("[red]A step was not finite: the update was not made.[/red]")


def print_traced(console: Console, traced: Traced) -> None:
    """Where the time goes, each part beside its floor."""
    found, span = traced.breakdown, traced.breakdown.span
    table = _table(
        f"One traced step: {traced.of.name}", ("part", "phase", "ms", "of step", "floor ms"), ()
    )
    table.add_column("× floor", justify="right")
    table.add_column("floor: what it must do")
    order = {name: number for number, name in enumerate(parts.PARTS)}
    for (part, phase), seconds in sorted(found.parts.items(), key=lambda i: order[i[0][0]]):
        floor = traced.floors.get((part, phase))
        table.add_row(
            part,
            phase,
            f"{seconds * 1e3:.1f}",
            f"{seconds / span:.1%}",
            f"{floor.seconds * 1e3:.1f}" if floor else "-",
            f"{seconds / floor.seconds:.2f}" if floor and floor.seconds else "-",
            floor.why if floor else "",
        )
    least, again = total(traced.floors), total(traced.floors, found.parts)
    table.add_section()
    table.add_row(
        "all", "", f"{span * 1e3:.1f}", "100%", f"{again * 1e3:.1f}", f"{span / again:.2f}"
    )
    console.print(table)
    console.print(
        f"Nothing ran in {traced.idle:.1%} of a step of the program as measured above. "
        "The table is of a program without command buffers, whose kernels can be told apart: "
        f"{traced.seconds:.3f} s a step, {traced.of.best:.3f} s with them; {found.kernels} kernels. "
        f"Floors: products at this run's matmul, bytes at this run's copy, attention at the stated rates; "
        f"without recomputing {least * 1e3:.0f} ms ({traced.of.case.tokens_a_rank / least:,.0f} tokens/s). "
        "A fusion counts as its last operation: the stand-ins' sums are partly fused into what uses them."
    )
    for direction, seconds in found.travelled.items():
        console.print(
            f"  {direction}: {seconds * 1e3:.1f} ms, beside whatever ran", highlight=False
        )
    for row in found.longest:
        if row["part"] == parts.UNKNOWN:
            console.print(f"  not attributed: {row['seconds'] * 1e3:.2f} ms {row['kernel'][:80]}")


def print_traffic(
    console: Console, found: Traffic, bandwidths: tuple[float, float], case: Measured, copies: float
) -> dict[str, Any]:
    """Exchanges on paper and the projection; returns it for the JSON file too."""
    table = _table("Exchanges of the real run, on paper", ("exchange", "kind", "runs"), ())
    for name in ("GB received a step", "ms"):
        table.add_column(name, justify="right")
    gather, scatter = bandwidths
    rows = []
    for one in found.exchanges:
        size = one.received(found.ranks)
        seconds = size / (gather if one.kind == "gather" else scatter)
        rows.append(one._asdict() | {"received": size, "seconds": seconds})
        table.add_row(
            one.name, one.kind, str(one.runs), f"{size / 1e9:.2f}", f"{seconds * 1e3:.1f}"
        )
    exchanged = found.seconds(gather, scatter)
    size = found.received()
    table.add_row("all", "", "", f"{size / 1e9:.2f}", f"{exchanged * 1e3:.1f}")
    console.print(table)
    ahead = project(statistics.median(case.seconds), copies, exchanged)
    tokens = case.case.real_tokens
    how = (
        f"Assumed: {gather / 1e9:.0f} GB/s received by a gather and {scatter / 1e9:.0f} by a sum on every "
        "GPU at once (by default what two H200s gave for large arrays); every rank as busy as this one; "
        "nothing slowed by what runs beside it; the stand-ins' copies "
        f"({copies * 1e3:.0f} ms) gone; as many bytes sent as received. Not measured."
    )
    console.print(
        f"{found.ranks} ranks, {case.name}: {tokens / ahead.shown:,.0f} tokens/s a GPU with every exchange "
        f"waited for, {tokens / ahead.hidden:,.0f} with all behind computation ({ahead.computed:.3f} s "
        f"computed, {exchanged:.3f} s exchanged); {case.tokens_a_second:,.0f} measured on this one "
        f"rank. {how}"
    )
    return {
        "rows": rows,
        "received_bytes": size,
        "seconds": exchanged,
        "case": case.name,
        "stand_ins_s": copies,
        "projection": ahead._asdict(),
        "assumptions": how,
    }


def print_startup(console: Console, startup: Startup) -> None:
    """From the process's creation to the end of the first step."""
    table = _table("Start", ("phase", "seconds"), ())
    table.add_column("compilation cache")
    for name, seconds, note in startup.phases:
        table.add_row(name, f"{seconds:.1f}", note)
    table.add_row("to the end of the first step", f"{startup.total:.1f}", "")
    console.print(table)


def _table(title: str, names: tuple[str, ...], more: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate((*names, *more)):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


def _span(values: Any) -> str:
    return f"{values.min():.2f}-{values.max():.2f}" if len(values) else "-"
