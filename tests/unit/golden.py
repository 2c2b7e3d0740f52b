"""The tiny checkpoints under `tests/golden`, and what foreign libraries computed with them."""

import dataclasses
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from kimi_jax.config import LoraSection
from kimi_jax.lora import plan_adapters
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.load import load_base
from kimi_jax.weights.names import module_name, peft_name

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = ("k2_thinking", "k25", "moonlight")

# tests/parity/adapters.py: rank and alpha of the stored adapters.
LORA = LoraSection(
    rank=4,
    alpha=8.0,
    targets=("attention", "dense", "shared", "routed", "head"),
    expert_rank=2,
    expert_alpha=6.0,
)


def checkpoint_directory(name):
    return GOLDEN / "checkpoints" / name


@cache
def checkpoint(name):
    return open_checkpoint(checkpoint_directory(name))


@cache
def base(name):
    return load_base(checkpoint(name))


@cache
def plan(name):
    """Every linear layer, as the stored adapters have it."""
    return plan_adapters(LORA, checkpoint(name).table)


@cache
def logits(name):
    return dict(np.load(GOLDEN / f"{name}_logits.npz"))


@cache
def gradients(name):
    return dict(np.load(GOLDEN / f"{name}_gradients.npz"))


def stack_peft(name, tensors):
    """PEFT's tensors, by PEFT's names, as stacked factors by their paths; every tensor is used once.

    Walks the plan and asks for each name, so that a factor which our names cannot reach, or a
    tensor that is left over, fails.
    """
    # The adapters were made on the text model alone, without a multimodal wrapper's prefix.
    config = dataclasses.replace(checkpoint(name).config, prefix="")
    tensors = dict(tensors)
    stacked = {}
    for path, adapter in plan(name).items():
        weight = adapter.weight
        for factor, shape in adapter.shapes().items():
            experts = range(config.n_routed_experts) if weight.role == "routed" else [None]
            parts = [
                tensors.pop(peft_name(module_name(weight, config, layer, expert), factor))
                for layer in range(weight.layers)
                for expert in experts
            ]
            stacked[f"{path}.{factor}"] = np.stack(parts).reshape(shape)
    assert not tensors, f"left over: {sorted(tensors)}"
    return stacked


@cache
def adapter(name):
    """The stored adapter: fp32 factors by path. B is not zero."""
    factors = stack_peft(name, load_file(GOLDEN / "adapters" / name / "adapter_model.safetensors"))
    return {path: jnp.asarray(value) for path, value in factors.items()}


@cache
def adapter_gradients(name):
    """Of the stored mean loss with respect to the stored adapter, by path."""
    prefix = "grad/"
    stored = {
        key.removeprefix(prefix): v for key, v in gradients(name).items() if key.startswith(prefix)
    }
    return stack_peft(name, stored)


def places(tokens):
    """Positions 0, 1, … and one segment a row, for tokens [B, T]."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32)
