"""A plan as tables for people."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kimi_jax.memory_settings import ADVISED_FRACTION, DEFAULT_FRACTION, FRACTION_SETTING
from kimi_jax.planning.compiled import CompiledStep
from kimi_jax.planning.hlo import summary
from kimi_jax.planning.memory import MemoryPlan
from kimi_jax.planning.options import Option

GIB = 2**30
BAR_WIDTH = 30


def print_plan(plan: MemoryPlan, elsewhere: Sequence[Option], console: Console) -> None:
    """Prints memory of a device, the node, parameters and work, and the same run elsewhere."""
    console.print(_memory(plan))
    console.print(f"[bold]{_verdict(plan)}[/bold]", soft_wrap=True, highlight=False)
    console.print(_workspace(plan))
    console.print(_facts(plan))
    console.print(_elsewhere(elsewhere))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _memory(plan: MemoryPlan) -> Table:
    table = _table(
        f"One of {plan.devices} × {plan.device} (mesh.data {plan.data}, mesh.expert {plan.expert})",
        "",
        "GiB a device",
        f"TB of {plan.devices}" if plan.devices > 1 else "TB",
    )
    table.add_column("")
    table.add_column("")
    for item in plan.items:
        if item.bytes:
            bar = "█" * max(1, round(BAR_WIDTH * item.bytes / plan.capacity))
            size, node = item.bytes / GIB, plan.devices * item.bytes / 1e12
            table.add_row(item.name, f"{size:,.2f}", f"{node:,.3f}", item.note, bar)
    table.add_section()
    node = plan.devices * plan.total / 1e12
    table.add_row("all", f"{plan.total / GIB:,.2f}", f"{node:,.3f}", "", "")
    capacity, of_node = plan.capacity / GIB, plan.devices * plan.capacity / 1e12
    table.add_row("memory", f"{capacity:,.2f}", f"{of_node:,.3f}", "", "")
    return table


def _verdict(plan: MemoryPlan) -> str:
    tokens = (
        f"{plan.micro_batch} rows of {plan.sequence_length:,}, {plan.tokens_per_device:,} a device"
    )
    largest = plan.largest_micro_batch
    limit = f"train.micro_batch of at most {largest} fits" if largest else "no micro-batch fits"
    if not plan.fits:
        return f"Does not fit: {tokens}; {limit}.{_offloaded(plan)}"
    told = ""
    if plan.fraction > DEFAULT_FRACTION:
        told = (
            f" JAX must be told to use more than its default {DEFAULT_FRACTION:.0%}: "
            f"{FRACTION_SETTING}={ADVISED_FRACTION}."
        )
    return f"Fits: {tokens}; {limit}.{told}{_offloaded(plan)}"


def _offloaded(plan: MemoryPlan) -> str:
    if not plan.offloaded:
        return ""
    sizes = plan.host / GIB, plan.devices * plan.host / GIB
    return (
        f" In the machine's memory, GiB: {sizes[0]:,.1f} for each device ({', '.join(plan.offloaded)}), "
        f"{sizes[1]:,.0f} for all."
    )


def _workspace(plan: MemoryPlan) -> Table:
    table = _table("Workspace by moment of the step; the largest counts", "", "GiB")
    for phase, terms in plan.phases.items():
        mark = " ←" if phase == plan.phase else ""
        table.add_row(f"{phase}{mark}", f"{sum(terms.values()) / GIB:,.2f}")
    return table


def _facts(plan: MemoryPlan) -> Table:
    table = _table("Model and work", "", "")
    parameters, flops = plan.parameters, plan.flops
    table.add_row("parameters", f"{parameters.total:,}")
    table.add_row("active a token, without the embedding", f"{parameters.active:,}")
    trained = parameters.trained
    table.add_row("trained", f"{trained:,} ({trained / parameters.total:.2%})")
    table.add_row("GFLOP a token, 4N", f"{flops.frozen / 1e9:,.1f}")
    table.add_row("GFLOP a token, with recomputation", f"{flops.recomputed / 1e9:,.1f}")
    table.add_row("GFLOP a token of attention scores, forward", f"{flops.attention / 1e9:,.1f}")
    return table


def _elsewhere(options: Sequence[Option]) -> Table:
    """Devices down, kinds across: needed bytes, and the most rows a device."""
    kinds = list(dict.fromkeys(option.device for option in options))
    capacities = {option.device: option.capacity / GIB for option in options}
    table = _table(
        "What would fit elsewhere: most rows a device, all devices sharing the experts",
        "devices",
        "GiB needed",
        *(f"{kind} {capacities[kind]:,.0f}" for kind in kinds),
    )
    for count in dict.fromkeys(option.devices for option in options):
        row = [option for option in options if option.devices == count]
        cells = [str(option.largest_rows) if option.largest_rows else "–" for option in row]
        table.add_row(str(count), f"{row[0].needed / GIB:,.1f}", *cells)
    table.caption = (
        "needed: with this run's rows a device. More devices than a machine has (8, H100 NVL 2) are "
        "joined by a network slower than NVLink. Memory alone is compared; the packed kernels are "
        "for Hopper."
    )
    table.caption_justify = "left"
    return table


def print_compiled(step: CompiledStep, plan: MemoryPlan, console: Console) -> None:
    """Prints the compiler's memory beside the plan's, its time, and the step's collectives."""
    table = _table(f"The train step compiled for {step.target}", "", "compiler, GiB", "plan, GiB")
    planned = plan.arguments
    rows = {
        "arguments": (step.arguments, planned),
        "temporaries": (step.temporaries, plan.program - planned),
        "results beside the arguments": (step.outputs - step.aliased, 0),
    }
    for name, sizes in rows.items():
        table.add_row(name, *(f"{size / GIB:,.2f}" for size in sizes))
    table.add_section()
    table.add_row("all", f"{step.total / GIB:,.2f}", f"{plan.program / GIB:,.2f}")
    difference = plan.program / step.total - 1
    table.caption = f"The plan is {difference:+.1%} of the compiler's. {step.implementation}"
    table.caption_justify = "left"
    console.print(table)
    tracing, compiling = step.seconds
    console.print(
        f"Traced and lowered in {tracing:.1f} s, compiled in {compiling:.1f} s.", highlight=False
    )
    exchanges = _table(
        "Collectives of a step", "", "in the program", "runs", "GB received", "largest result"
    )
    for kind, found in summary(list(step.exchanges)).items():
        largest = max(
            (array for one in step.exchanges if one.kind == kind for array in one.result),
            key=lambda array: array.bytes,
        )
        exchanges.add_row(
            kind,
            str(found["count"]),
            str(found["runs"]),
            f"{found['bytes'] / 1e9:,.2f}",
            str(largest),
        )
    console.print(exchanges)
