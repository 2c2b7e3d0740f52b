"""An export by the first process, of which all learn what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_jax.lora import AdapterPlan
from kimi_jax.parallel import processes
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.export import ExportFormat, export_adapter
from kimi_jax.weights.merge_report import MergeReport, report_of


def export_on_first(
    out_dir: str | Path,
    checkpoint: Checkpoint,
    plan: AdapterPlan,
    adapters: Mapping[str, Any],
    format: ExportFormat,
) -> Path | MergeReport:
    """`kimi_jax.weights.export.export_adapter` of adapters on the devices, called by all processes.

    Returns:
        The directory, or of a merged checkpoint the report of it.
    """
    directory, values = Path(out_dir), processes.to_host(dict(adapters))

    def write() -> dict[str, Any] | None:
        report = export_adapter(directory, checkpoint, plan, values, format)
        return None if report is None else report.as_json()

    found = processes.on_first(write)
    return directory if found is None else report_of(found)
