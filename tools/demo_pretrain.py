"""Trains the demo's base model from scratch, all weights, aware of the int4 rounding that follows.

Routed experts are rounded as they will be stored (group 32, absmax / 7) and the other weights to
bf16 in every forward pass, with the gradient passed straight through; so what is stored says what
was trained. The router's correction bias is moved after each step towards even loads, as
DeepSeek-V3's is (arXiv:2412.19437, section 2.1.2), instead of an auxiliary loss.
"""

import zlib
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kimi_jax.int4 import GROUP_SIZE, LARGEST_CODE, SMALLEST_SCALE
from kimi_jax.model.transformer import ModelDef
from kimi_jax.training.loss import loss_terms

BIAS_STEP = 1e-3
PROMPT_WEIGHT = 0.3  # of predicting the tokens of a question: it teaches which words go together
LOSS_CHUNK = 4096

Tree = dict[str, Any]


def init_weights(model_def: ModelDef, seed: int) -> Tree:
    """fp32 initial values: norms 1, correction bias 0, everything else normal with std 1/√in."""
    weights = {}
    for path, like in model_def.base_shapes.items():
        if "norm" in path:
            weights[path] = np.ones(like.shape, np.float32)
        elif path.endswith("e_score_correction_bias"):
            weights[path] = np.zeros(like.shape, np.float32)
        else:
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            std = 1.0 if path == "embed_tokens" else like.shape[-1] ** -0.5
            weights[path] = std * rng.standard_normal(like.shape, np.float32)
    return {path: jnp.asarray(value) for path, value in weights.items()}


def pretrain(
    model_def: ModelDef,
    weights: Tree,
    batches: Iterator[dict[str, np.ndarray]],
    steps: int,
    learning_rate: float,
) -> Tree:
    """AdamW with warm-up and cosine decay over `steps` batches; prints the loss now and then."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, steps // 20, steps, learning_rate / 50
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.5)
    )

    def loss(trained: Tree, batch: Any) -> tuple[Any, Any]:
        terms = loss_terms(model_def.bind(as_stored(trained), {}), batch, LOSS_CHUNK)
        return terms.loss_sum / terms.weight_sum, terms

    @jax.jit
    def step(trained: Tree, opt_state: Any, batch: Any) -> tuple[Tree, Any, Any]:
        (value, terms), gradients = jax.value_and_grad(loss, has_aux=True)(trained, batch)
        bias = "moe_layers.mlp.gate.e_score_correction_bias"
        gradients[bias] = jnp.zeros_like(gradients[bias])
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        old_bias = trained[bias]
        trained = dict(cast(Tree, optax.apply_updates(trained, updates)))
        load = terms.expert_load.astype(jnp.float32)
        trained[bias] = old_bias + BIAS_STEP * jnp.sign(load.mean(1, keepdims=True) - load)
        return trained, opt_state, value

    opt_state = optimizer.init(weights)
    for number in range(1, steps + 1):
        weights, opt_state, value = step(weights, opt_state, _with_prompts(next(batches)))
        if number % 25 == 0 or number in (1, steps):
            print(f"step {number} of {steps}: loss {float(value):.4f}", flush=True)
    return weights


def _with_prompts(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with some weight on every token that has one before it, not on answers alone."""
    inside = (batch["segment_ids"] > 0) & (batch["positions"] > 0)
    at_least = np.where(inside, np.float32(PROMPT_WEIGHT), np.float32(0))
    return batch | {"loss_weights": np.maximum(batch["loss_weights"], at_least)}


def as_stored(weights: Tree) -> Tree:
    """The values that the checkpoint will hold, with straight-through gradients."""

    def stored(path: str, value: Any) -> Any:
        if path.endswith("e_score_correction_bias"):
            return value
        rounded = _round_int4(value) if ".experts." in path else value
        rounded = rounded.astype(jnp.bfloat16).astype(jnp.float32)
        return value + jax.lax.stop_gradient(rounded - value)

    return {path: stored(path, value) for path, value in weights.items()}


def _round_int4(weight: Any) -> Any:
    """Moonshot's rule, as `kimi_jax.int4.quantise_numpy` has it for files, in a traceable form."""
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP_SIZE)
    absmax = jnp.abs(groups).max(-1, keepdims=True)
    scale = jnp.maximum(absmax / LARGEST_CODE, SMALLEST_SCALE)
    scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
    codes = jnp.clip(jnp.rint(groups / scale), -LARGEST_CODE, LARGEST_CODE)
    return (codes * scale).reshape(weight.shape)
