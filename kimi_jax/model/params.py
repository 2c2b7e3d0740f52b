"""The one table of the model's weights.

Shapes, initial values, HF names, adapter targets, memory and counts all walk these rows, so they
cannot disagree. A row's `name` is its place in the module tree below its stack, which is also HF's
name below the layer (`kimi_jax.weights.names` turns one into the other).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kimi_jax.axes import AXES
from kimi_jax.int4 import GROUP_SIZE, VALUES_PER_WORD
from kimi_jax.model.config import ModelConfig

Storage = Literal["bf16", "fp32", "int4"]
Role = Literal["embedding", "attention", "dense", "shared", "routed", "router", "norm", "head"]
Stack = Literal["", "dense_layers", "moe_layers"]

LINEAR_ROLES: tuple[Role, ...] = ("attention", "dense", "shared", "routed", "head")
BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Weight:
    """One row: a weight of the model, or the same weight of every layer of a stack.

    `axes` spells the shape of one layer's weight: dimensions separated by spaces, `N*H+R` is the
    product of the factors N and (H+R). Orientation is HF's, [out, in].
    """

    stack: Stack
    name: str
    axes: str
    storage: Storage
    role: Role
    layers: int
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """Place in the module tree, `moe_layers.self_attn.q_a_proj`."""
        return f"{self.stack}.{self.name}" if self.stack else self.name

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape with the leading layer dimension, if the weight stands in a stack."""
        return (self.layers, *self.shape) if self.stack else self.shape

    @property
    def is_linear(self) -> bool:
        """Whether an adapter can be attached: [out, in] or, for routed experts, [E, out, in]."""
        return self.role in LINEAR_ROLES

    @property
    def parameters(self) -> int:
        """Values of all layers together."""
        return math.prod(self.stacked_shape) if self.stack else math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all layers together as held in memory: packed values and scales for int4."""
        if self.storage == "int4":
            return self.parameters // 2 + self.parameters // GROUP_SIZE * BYTES["bf16"]
        return self.parameters * BYTES[self.storage]


def sizes(config: ModelConfig) -> dict[str, int]:
    """Axis letter to size, for the letters that a checkpoint's config decides."""
    named = {letter: axis.config_field for letter, axis in AXES.items() if axis.config_field}
    return {letter: getattr(config, field) or 0 for letter, field in named.items()}


def weight_table(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of the model that `config` describes."""
    return tuple(_rows(config))


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the int32 words of an int4 weight [..., out, in]: [..., out, in/8]."""
    return (*shape[:-1], shape[-1] // VALUES_PER_WORD)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an int4 weight [..., out, in] in memory: [..., in/32, out]."""
    return (*shape[:-2], shape[-1] // GROUP_SIZE, shape[-2])


def _rows(config: ModelConfig) -> Iterator[Weight]:
    size_of = sizes(config)

    def row(stack: Stack, name: str, axes: str, role: Role, storage: Storage = "bf16") -> Weight:
        shape = tuple(
            math.prod(
                sum(size_of[letter] for letter in factor.split("+")) for factor in dim.split("*")
            )
            for dim in axes.split()
        )
        layers = {"": 1, "dense_layers": config.first_k_dense_replace}.get(
            stack, config.num_moe_layers
        )
        return Weight(stack, name, axes, storage, role, layers, shape)

    yield row("", "embed_tokens", "V D", "embedding")
    stacks: list[Stack] = []
    if config.first_k_dense_replace:
        stacks.append("dense_layers")
    if config.num_moe_layers:
        stacks.append("moe_layers")
    for stack in stacks:
        yield row(stack, "input_layernorm", "D", "norm")
        if config.q_lora_rank is None:
            yield row(stack, "self_attn.q_proj", "N*H+R D", "attention")
        else:
            yield row(stack, "self_attn.q_a_proj", "Q D", "attention")
            yield row(stack, "self_attn.q_a_layernorm", "Q", "norm")
            yield row(stack, "self_attn.q_b_proj", "N*H+R Q", "attention")
        yield row(stack, "self_attn.kv_a_proj_with_mqa", "C+R D", "attention")
        yield row(stack, "self_attn.kv_a_layernorm", "C", "norm")
        yield row(stack, "self_attn.kv_b_proj", "N*H+U C", "attention")
        yield row(stack, "self_attn.o_proj", "D N*U", "attention")
        yield row(stack, "post_attention_layernorm", "D", "norm")
        if stack == "dense_layers":
            for name in ("gate_proj", "up_proj"):
                yield row(stack, f"mlp.{name}", "F D", "dense")
            yield row(stack, "mlp.down_proj", "D F", "dense")
            continue
        yield row(stack, "mlp.gate.weight", "E D", "router")
        yield row(stack, "mlp.gate.e_score_correction_bias", "E", "router", "fp32")
        experts: Storage = "int4" if config.packed_experts else "bf16"
        for name in ("gate_proj", "up_proj"):
            yield row(stack, f"mlp.experts.{name}", "E M D", "routed", experts)
            yield row(stack, f"mlp.shared_experts.{name}", "X*M D", "shared")
        yield row(stack, "mlp.experts.down_proj", "E D M", "routed", experts)
        yield row(stack, "mlp.shared_experts.down_proj", "D X*M", "shared")
    yield row("", "norm", "D", "norm")
    yield row("", "lm_head", "V D", "head")
