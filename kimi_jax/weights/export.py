"""What leaves the program: adapters in PEFT's layouts, checkpoints with the adapter merged in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from kimi_jax.errors import UserError
from kimi_jax.lora import AdapterPlan
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.export_hf import MergeFormat, write_merged
from kimi_jax.weights.export_peft import write_peft
from kimi_jax.weights.merge_report import MergeReport

AdapterFormat = Literal["peft", "peft-fused"]
ExportFormat = AdapterFormat | MergeFormat
FORMATS: tuple[str, ...] = (*get_args(AdapterFormat), *get_args(MergeFormat))


def export_adapter(
    out_dir: Path,
    checkpoint: Checkpoint,
    plan: AdapterPlan,
    adapters: Mapping[str, Any],
    format: ExportFormat,
) -> MergeReport | None:
    """Writes `adapters` to a new directory; of a merged checkpoint, says what became of them.

    Args:
        out_dir: must be absent or empty.
        checkpoint: the base the adapters belong to.
        plan: what is adapted.
        adapters: factors by path, fp32.
        format: `peft` names every expert, `peft-fused` is the layout of transformers 5's fused experts,
            `merged-int4` and `merged-bf16` are whole checkpoints.

    Raises:
        UserError: a directory in use, an unknown format, or an adapter that the format cannot hold.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; required: one of {', '.join(FORMATS)}")
    if format in ("peft", "peft-fused"):
        write_peft(out_dir, plan, checkpoint.config, adapters, str(checkpoint.directory), format)
    else:
        return write_merged(out_dir, checkpoint, plan, adapters, format)
    return None
