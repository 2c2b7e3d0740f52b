"""HF's names: which tensors a checkpoint must hold, and what PEFT calls an adapter's factors."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight, packed_shape

Part = Literal["value", "packed", "scale", "shape"]

# What a file may store for what is held in memory; anything wider or narrower is refused.
ACCEPTED_DTYPES: dict[str, tuple[str, ...]] = {
    "bf16": ("BF16",),
    "fp32": ("F32", "BF16"),  # widening is exact
    "packed": ("I32",),
    "scale": ("BF16",),
    "shape": ("I32", "I64"),  # compressed-tensors itself writes I64
}
_SUFFIX: dict[Part, str] = {
    "value": ".weight",
    "packed": ".weight_packed",
    "scale": ".weight_scale",
    "shape": ".weight_shape",
}
_VISION = ("vision_tower.", "mm_projector.", "multi_modal_projector.")
PEFT_PREFIX = "base_model.model."


class Tensor(NamedTuple):
    """One tensor that a checkpoint must hold: a weight, or a part of one, of one layer and expert."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    weight: Weight
    layer: int  # within the weight's stack
    expert: int | None
    part: Part


def tensors_of(weight: Weight, config: ModelConfig) -> Iterator[Tensor]:
    """The tensors of one row of the weight table, layer by layer, expert by expert."""
    for layer in range(weight.layers):
        experts: Sequence[int | None] = (
            range(config.n_routed_experts) if weight.role == "routed" else [None]
        )
        for expert in experts:
            shape = weight.shape if expert is None else weight.shape[1:]
            module = module_name(weight, config, layer, expert)
            if weight.storage != "int4":
                # The correction bias is a parameter of its own, not the weight of a module.
                own_name = weight.name.endswith(("gate.weight", "e_score_correction_bias"))
                name = module if own_name else module + _SUFFIX["value"]
                dtypes = ACCEPTED_DTYPES[weight.storage]
                yield Tensor(name, dtypes, shape, weight, layer, expert, "value")
                continue
            shapes: dict[Part, tuple[int, ...]] = {
                "packed": packed_shape(shape),
                "scale": (shape[0], shape[1] // GROUP_SIZE),
                "shape": (2,),
            }
            for part, part_shape in shapes.items():
                name = module + _SUFFIX[part]
                yield Tensor(name, ACCEPTED_DTYPES[part], part_shape, weight, layer, expert, part)


def expected_tensors(table: Sequence[Weight], config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of the checkpoint that `config` describes, by HF name."""
    return {tensor.name: tensor for weight in table for tensor in tensors_of(weight, config)}


def module_name(weight: Weight, config: ModelConfig, layer: int, expert: int | None) -> str:
    """HF's module of a weight, `model.layers.7.mlp.experts.3.gate_proj`, prefix of a wrapper included."""
    name = weight.name
    if expert is not None:
        name = name.replace("mlp.experts.", f"mlp.experts.{expert}.")
    if not weight.stack:
        return f"{config.prefix}{name}" if name == "lm_head" else f"{config.prefix}model.{name}"
    number = layer + (config.first_k_dense_replace if weight.stack == "moe_layers" else 0)
    return f"{config.prefix}model.layers.{number}.{name}"


def left_aside(name: str, config: ModelConfig) -> str | None:
    """Why a tensor that the language model does not need is skipped, or None if it is not known."""
    if config.prefix and name.startswith(_VISION):
        return "vision tower and projector"
    if name.endswith("rotary_emb.inv_freq"):
        return "rotary frequencies, which are computed"
    return None


def peft_name(module: str, factor: str) -> str:
    """PEFT's name of a factor: `base_model.model.<module>.lora_A.weight`."""
    return f"{PEFT_PREFIX}{module}.{factor}.weight"
