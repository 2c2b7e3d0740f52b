"""transformers' configuration object of a checkpoint of the family."""

from collections.abc import Mapping
from typing import Any


def hf_config(config: Mapping[str, Any], attention: str, experts: str, **changes: Any) -> Any:
    """A DeepseekV3Config: packing left out, since transformers' experts are bf16.

    Args:
        config: the contents of a `config.json`.
        attention: transformers' name of an attention implementation.
        experts: transformers' name of an implementation of the experts.
        changes: of fields.
    """
    from transformers import DeepseekV3Config  # pyright: ignore[reportMissingImports]

    left_out = ("quantization_config", "auto_map", "dtype", "torch_dtype", "architectures")
    fields = {key: value for key, value in config.items() if key not in left_out}
    made = DeepseekV3Config.from_dict({**fields, "model_type": "deepseek_v3", **changes})
    made._attn_implementation = attention
    made._experts_implementation = experts
    return made
