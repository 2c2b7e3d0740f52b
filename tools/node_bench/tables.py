"""What the sections found, as short tables for people; rows are what the JSON file has."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.step_bench.overlap import Overlap
from tools.step_bench.rank import Rank

GIB = 2**30
LISTED = 8  # kernels of a GPU's exchanges, by time


def print_case(console: Console, case: Mapping[str, Any]) -> None:
    """One case, as soon as it is measured."""
    name = f"{case['rows']}, {case['routing']}, {case['how']}, {case['steps']} steps"
    if "error" in case:
        console.print(f"{name}: FAILED: {case['error']}\n{case['traceback']}", markup=False)
        return
    losses, norms = case["losses"], case["grad_norms"]
    console.print(
        f"{name}: median {case['median_s']:.3f} s, mean {case['mean_s']:.3f}, fastest {case['best_s']:.3f}; "
        f"{case['tokens_a_second']:,.0f} tokens/s, {case['tokens_a_second_gpu']:,.0f} a GPU, MFU 4N "
        f"{case['mfu']['4N']:.1%}; padding {case['padding_share']:.1%}; loss {losses[0]:.4f} to "
        f"{losses[-1]:.4f}, gradient's norm {norms[0]:.3g} to {norms[-1]:.3g}, "
        f"{'all finite' if case['finite'] else 'NOT FINITE'}",
        highlight=False,
        markup=False,
    )


def print_cases(console: Console, found: Mapping[str, Any], rank: Rank) -> None:
    """Memory of each GPU beside the plan, and what each rank's experts received."""
    plan, compiler = found["plan_bytes"] / GIB, found["compiler_bytes"] / GIB
    table = _table(
        f"Memory, GiB: plan {plan:.2f}, compiler {compiler:.2f}",
        "GPU",
        "peak so far",
        "after",
        "limit",
    )
    for one in found.get("memory", []):
        sizes = (one[key] / GIB for key in ("peak", "in_use", "limit"))
        table.add_row(str(one["device"]), *(f"{size:.2f}" if size else "-" for size in sizes))
    console.print(table)
    names = ("of the mean rank's", "by layer", "passes, at most", "experts, of the mean's")
    table = _table("Assignments to a rank's experts", "rows, routing, rank", *names)
    seen = set()
    for case in found["cases"]:
        kind = f"{case['rows']}, {case['routing']}"
        if "error" in case or kind in seen:
            continue
        seen.add(kind)
        for number, load in enumerate(case["loads"]):
            layers, passes = load["received_to_mean_by_layer"], load["passes_by_layer"]
            table.add_row(
                f"{kind}, {number}{' alone' if rank.ranks.alone else ''}",
                f"{load['received_to_mean']:.3f}",
                f"{min(layers):.2f} to {max(layers):.2f}" if layers else "-",
                str(max(passes, default=0)),
                f"{load['idlest_expert_to_mean']:.2f} to {load['busiest_expert_to_mean']:.1f}",
            )
    console.print(table)


def overlap_rows(
    devices: Mapping[int, tuple[Overlap, Mapping[str, tuple[float, int]]]], received: float
) -> list[dict[str, Any]]:
    """For the JSON file: seconds of each GPU, and its longest exchanging kernels.

    Args:
        devices: by number, what `tools.step_bench.trace.exchanges` gives.
        received: bytes that a GPU receives in a step.
    """
    return [
        {
            "device": device,
            **found._asdict(),
            "received_gb_s": received / 1e9 / found.exchanged if found.exchanged else None,
            "kernels": [
                {"kernel": name[:80], "seconds": seconds, "calls": calls}
                for name, (seconds, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])
            ][:LISTED],
        }
        for device, (found, kernels) in devices.items()
    ]


def print_overlap(console: Console, rows: Sequence[Mapping[str, Any]], of: str) -> None:
    """What of the exchanges was hidden."""
    names = ("span", "computing", "exchanging", "hidden", "exposed", "idle", "GB/s received")
    table = _table(f"One traced step, ms on each GPU: {of}", "GPU", *names)
    for row in rows:
        parts = ("span", "computed", "exchanged", "hidden", "exposed", "idle")
        rate = row["received_gb_s"]
        table.add_row(
            str(row["device"]),
            *(f"{row[name] * 1e3:.1f}" for name in parts),
            f"{rate:.0f}" if rate else "-",
        )
    console.print(table)
    console.print(
        "Exchanging: an exchange's kernel ran, waiting for slower ranks included; hidden: while this GPU "
        "computed, exposed: while it did not. GB/s: bytes on paper in that time."
    )
    for kernel in rows[0]["kernels"][:4] if rows else ():
        console.print(
            f"  GPU {rows[0]['device']}: {kernel['seconds'] * 1e3:.1f} ms, {kernel['calls']} calls of "
            f"{kernel['kernel']}",
            markup=False,
            highlight=False,
        )


def print_checkpoint(console: Console, found: Mapping[str, Any]) -> None:
    """Seconds and bytes."""
    saving, restoring = found["host_memory_saving"], found["host_memory_restoring"]
    console.print(
        f"{found['bytes'] / 1e9:.2f} GB of adapters and moments after {found['updates_made']} updates; on "
        f"disk {found['bytes_on_disk'] / 1e9:.2f} GB in {found['files']} files. Saved in "
        f"{found['save_s']:.1f} s ({found['save_gb_s']:.2f} GB/s), of which training waits "
        f"{found['save_blocks_s']:.1f} s; restored from a cold cache in {found['restore_s']:.1f} s "
        f"({found['restore_gb_s']:.2f} GB/s), equal bit for bit. Host memory beyond before: saving "
        f"{saving['process_gb']:.1f} GB, restoring {restoring['process_gb']:.1f} GB.",
        highlight=False,
    )


def print_decoded(console: Console, row: Mapping[str, Any]) -> None:
    """One batch."""
    console.print(
        f"batch {row['batch']}: {row['tokens_a_second']:,.1f} tokens/s ({row['token_s'] * 1e3:.1f} ms a "
        f"step); {row['new_tokens']} tokens behind {row['prompt_tokens']} in {row['whole_s']:.2f} s, prompt "
        f"and first token {row['prompt_and_first_s']:.2f} s; compiled in {row['compile_s']:.1f} s",
        highlight=False,
    )


def print_comparison(console: Console, found: Mapping[str, Any]) -> None:
    """All ranks beside one alone."""
    table = _table("All ranks beside one alone, s", "", "one alone", "all", "difference")
    for row in found["steps"]:
        alone, together = row["alone_s"], row["all_s"]
        table.add_row(row["what"], f"{alone:.3f}", f"{together:.3f}", f"{together - alone:+.3f}")
    table.add_section()
    for row in found["parts"]:
        alone, together = row["alone_s"], row["all_s"]
        table.add_row(row["part"], f"{alone:.3f}", f"{together:.3f}", f"{together - alone:+.3f}")
    console.print(table)
    for line in found["notes"]:
        console.print(line, highlight=False, markup=False)


def print_summary(console: Console, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each section."""
    table = _table("Summary", "section", "state", "s", "what was found")
    for name, found in sections.items():
        seconds = f"{found['seconds']:.0f}" if "seconds" in found else "-"
        table.add_row(name, found["state"], seconds, headline(name, found))
    table.columns[-1].justify = "left"
    console.print(table)


def headline(name: str, found: Mapping[str, Any]) -> str:
    """The figure of a section that is looked for first, or why there is none."""
    said = found.get("error") or found.get("reason")
    lines = [said] if said else []
    if name in ("step", "rank"):
        for case in found.get("cases", []):
            if "error" not in case:
                lines.append(
                    f"{case['rows']}, {case['routing']}, {case['how']}: {case['mean_s']:.3f} s, "
                    f"{case['tokens_a_second']:,.0f} tokens/s, {case['tokens_a_second_gpu']:,.0f} a GPU, "
                    f"{case['mfu']['4N']:.1%}"
                )
        if peaks := [one["peak"] for one in found.get("memory", [])]:
            lines.append(f"peak {max(peaks) / GIB:.1f} GiB, plan {found['plan_bytes'] / GIB:.1f}")
        if "startup" in found:
            lines.append(f"first step {found['startup']['total_s']:.0f} s after the process began")
    elif name in ("breakdown", "rank_breakdown") and "span_s" in found:
        lines.append(f"{found['span_s']:.3f} s traced, {found['kernels']} kernels on one GPU")
    elif name == "checkpoint" and "save_s" in found:
        restored = f", restored {found['restore_s']:.1f} s" if "restore_s" in found else ""
        lines.append(f"{found['bytes'] / 1e9:.1f} GB: saved {found['save_s']:.1f} s{restored}")
    elif name == "decode":
        for row in found.get("batches", []):
            lines.append(f"batch {row['batch']}: {row['tokens_a_second']:,.1f} tokens/s")
    elif name == "import":
        for state in ("cold", "warm"):
            if one := found.get(state):
                lines.append(f"{state}: {one['import_gb_s']} GB/s, {one['of_raw']} of raw")
    return "\n".join(lines)


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table
