"""Adapters out, as PEFT directories; `import_peft` reads them.

`peft` has one module per routed expert: what vLLM, SGLang and Moonshot's own code read. `peft-fused`
is for transformers 5, where the experts of a layer are one parameter. Engines that ignore
`alpha_pattern` compute alpha / r for every target: give them adapters whose experts keep that ratio.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array

from kimi_jax.errors import UserError, listing
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.config import ModelConfig
from kimi_jax.weights.output import new_directory, write_safetensors
from kimi_jax.weights.peft_config import CONFIG, TENSORS, Layout, adapter_config
from kimi_jax.weights.peft_layout import fused_tensors, per_expert_tensors


def peft_parameters(
    plan: AdapterPlan,
    config: ModelConfig,
    arrays: Mapping[str, Array | np.ndarray],
    repeat_shared: bool = True,
) -> dict[str, np.ndarray]:
    """Stacked factors, or their gradients, by PEFT's per-expert names.

    Args:
        plan: what is adapted.
        config: the base's numbers.
        arrays: by the paths of `adapter_shapes(plan)`.
        repeat_shared: a factor that a layer's experts share stands under each expert's name. False:
            once, under a name without an expert, `….mlp.experts.gate_proj.lora_A.weight`, as is right
            for gradients, where it is one parameter.

    Returns:
        Float32 arrays [r, in] and [out, r] on the host.
    """
    return dict(per_expert_tensors(plan, config, arrays, repeat_shared))


def write_peft(
    out_dir: Path,
    plan: AdapterPlan,
    config: ModelConfig,
    adapters: Mapping[str, Array | np.ndarray],
    base_name: str | None,
    layout: Layout = "peft",
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, float32.

    Args:
        out_dir: new or empty; it appears whole or not at all.
        plan: what is adapted; at least one weight.
        config: the base's numbers.
        adapters: stacked factors by the paths of `adapter_shapes(plan)`.
        base_name: `base_model_name_or_path` of the adapter.
        layout: one module per expert, or transformers' fused expert parameters.

    Raises:
        UserError: an output directory in use, factors that are not finite, or a plan that the fused
            layout cannot express.
    """
    assert plan, "nothing is adapted"
    check_finite(adapters)
    make = fused_tensors if layout == "peft-fused" else per_expert_tensors
    tensors = dict(make(plan, config, adapters))
    settings = adapter_config(plan, config, base_name, layout)
    size = sum(array.nbytes for array in tensors.values())
    with new_directory(out_dir, size) as folder:
        write_safetensors(folder / TENSORS, tensors)
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")


def check_finite(adapters: Mapping[str, Array | np.ndarray]) -> None:
    """Refuses factors with NaN or infinity, naming them all."""
    broken = [path for path, value in adapters.items() if not np.isfinite(value).all()]
    if broken:
        raise UserError(
            listing(
                "this adapter is not finite and cannot be exported",
                [f"{path}: holds NaN or infinity" for path in broken],
                "Export an earlier checkpoint of the run.",
            )
        )
