"""One rank's work on one device: time and memory of the real train step, beside the plan of it.

    python tools/measure_rank.py --config configs/k2_thinking_8xh200.yaml [--layers N] [section.field=value …]

The device does what one of the run's devices would do: its experts for all ranks' rows, its part of the
vocabulary and of all other weights. What it would receive from the others is made of copies of its own
data, so the loss means nothing. Weights are random and made on the device. With
JAX_COMPILATION_CACHE_DIR set, a second run shows what starting again costs.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.config import RunConfig
from kimi_jax.config_file import load_config
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.parallel.sharding import local_shape
from kimi_jax.planning.arrays import mesh_shape
from kimi_jax.planning.gpus import DEFAULT, Gpu, find_gpu, known_gpus
from kimi_jax.planning.memory import abstract_ranks, plan_sizing, read_architecture, sizing_of
from kimi_jax.training.absent import model_of, report_of
from kimi_jax.training.optimizer import make_optimizer
from kimi_jax.training.step import init_state, make_train_step
from tools.random_base import random_base

GIB = 2**30


def make_adapters(model_def: ModelDef, ranks: Ranks) -> dict[str, Any]:
    """This rank's factors, on the device: A small, B zero."""
    adapters = {}
    for number, (path, leaf) in enumerate(model_def.adapter_shapes.items()):
        spec = model_def.adapter_specs[path]
        shape = local_shape(path, leaf.shape, spec, mesh_shape(ranks))
        key = jax.random.key(number, impl="rbg")
        small = path.endswith("lora_A")
        adapters[path] = 0.01 * jax.random.normal(key, shape) if small else jnp.zeros(shape)
    return adapters


def make_batch(config: RunConfig, model: ModelConfig, ranks: Ranks) -> dict[str, Any]:
    """Random tokens, this rank's rows of [micro-batches, B, T]."""
    train = config.train
    shape = (train.accumulate, train.micro_batch // ranks.count, train.sequence_length)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    batch = {"tokens": tokens, "loss_weights": ones.astype(np.float32)}
    return jax.device_put(batch | {"positions": positions, "segment_ids": ones})


def this_gpu() -> Gpu:
    """What is at hand if the plan knows it, or the plan's default."""
    kind = jax.devices()[0].device_kind
    return next((gpu for gpu in known_gpus() if gpu.device_kind == kind), find_gpu(DEFAULT))


def run_steps(step: Any, arguments: Any, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the last loss."""
    state, base, batch = arguments
    seconds, loss = [], float("nan")
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = step(state, base, batch)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - began)
    return seconds, loss


def measure(config: RunConfig, model: ModelConfig, steps: int) -> dict[str, Any]:
    """Makes the rank, compiles its step, runs it."""
    ranks, device = abstract_ranks(config), jax.devices()[0]
    model_def = model_of(config, model, ranks)
    began = time.perf_counter()
    base = jax.block_until_ready(random_base(model_def))
    made = time.perf_counter() - began
    optimizer = make_optimizer(config.train)
    state = init_state(make_adapters(model_def, ranks), optimizer, ranks)
    arguments = (state, base, make_batch(config, model, ranks))
    standing = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    began = time.perf_counter()
    lowered = make_train_step(model_def, optimizer, config.train.loss_chunk).lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    times = (middle - began, time.perf_counter() - middle)
    report = report_of(compiled, compiled.as_text(), device.device_kind, times)
    seconds, loss = run_steps(compiled, arguments, steps)
    plan = plan_sizing(sizing_of(config, model), this_gpu())
    tokens = plan.tokens_per_device * config.train.accumulate
    return {
        "device": device.device_kind,
        "layers": model.num_hidden_layers,
        "seconds_to_make_weights": made,
        "seconds_to_trace_and_lower": times[0],
        "seconds_to_compile": times[1],
        "seconds_a_step": seconds,
        "tokens_a_second": tokens / min(seconds),
        "loss_without_meaning": loss,
        "peak_before_steps_gib": standing / GIB,
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB,
        "compiler_gib": report.total / GIB,
        "plan_gib": plan.program / GIB,
        "kernels": report.implementation,
    }


def main() -> None:
    """Reads the command line, measures, and prints one JSON object."""
    parser = argparse.ArgumentParser(description="One rank's work on one device.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--layers", type=int, help="instead of the checkpoint's")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    model = read_architecture(config)
    if options.layers is not None:
        model = replace(model, num_hidden_layers=options.layers)
    print(json.dumps(measure(config, model, options.steps), indent=1))


if __name__ == "__main__":
    main()
