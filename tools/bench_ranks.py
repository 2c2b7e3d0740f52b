"""Several GPUs of one host against one: the same losses, and what the exchange between them costs.

    python tools/bench_ranks.py --checkpoint configs/k2_thinking --ranks 2 --layers 8

A model of the checkpoint's width, with `--layers` layers and as many experts as each token takes, so
that nothing is chosen and rounding cannot choose otherwise; weights at random, made on the devices.
The train step runs on the mesh, whole and in half batches; with the exchanges replaced by local
copies of the same shapes (one rank's work on one GPU); and on one device with all experts and the
same rows. The exchanges are then timed by themselves. Their time in the step is the step's less the
copies' step's; what is missing from their own time was hidden behind computation.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kimi_jax.config import LoraSection, MeshSection, TrainSection
from kimi_jax.lora import init_adapters, plan_adapters
from kimi_jax.memory_settings import allow_jax_memory
from kimi_jax.model.config import load_model_config
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.layout import in_parts
from kimi_jax.model.params import weight_table
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.mesh import EXPERT
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks, make_ranks
from kimi_jax.training.programs import Programs
from kimi_jax.training.step import init_state
from kimi_jax.training.structure import DTYPES
from tools.random_base import random_base

TARGETS = ("attention", "dense", "shared", "routed", "head")
# Exchanges of a layer's rows: to the experts and back, once more to recompute what the experts saw,
# and both ways again for the gradients.
GATHERS, SCATTERS, WEIGHT_GATHERS = 3, 2, 2


class Case:
    """One way of running the same steps."""

    def __init__(self, options: argparse.Namespace, name: str, ranks: Ranks, halves: int) -> None:
        config = load_model_config(Path(options.checkpoint))
        config = replace(
            config,
            num_hidden_layers=options.layers,
            n_routed_experts=options.experts or config.num_experts_per_tok,
        )
        table = weight_table(config)
        self.name, self.ranks, self.table = name, ranks, table
        targets = LoraSection(rank=8, alpha=16, targets=TARGETS)
        plan = plan_adapters(targets, table)
        settings = ModelSettings(DTYPES[options.dtype], ranks=ranks, half_batches=halves)
        self.model_def = ModelDef(config, plan, settings)
        train = TrainSection(
            steps=100, learning_rate=1e-4, micro_batch=1, accumulate=1, sequence_length=2
        )
        self.programs = Programs(self.model_def, train)
        specs = self.model_def.adapter_specs
        adapters = init_adapters(plan, 0, lambda path, value: ranks.put(value, specs[path]))
        self.state = init_state(adapters, self.programs.optimizer, ranks)
        self.base = random_base(self.model_def)

    def run(self, batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """Losses, and seconds of the first and of the fastest later step."""
        losses, seconds = [], []
        for batch in batches:
            placed = jax.block_until_ready(self.ranks.put_batch(batch))
            began = time.perf_counter()
            self.state, metrics = self.programs.train_step(self.state, self.base, placed)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - began)
        peak = max(
            ((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()),
        )
        return {
            "case": self.name,
            "losses": losses,
            "first_step_s": seconds[0],
            "step_s": min(seconds[1:]),
            "peak_gib": peak / 2**30,
        }


def exchange_seconds(case: Case, tokens: int) -> dict[str, float]:
    """Seconds of one step's exchanges by themselves, by kind; `tokens` are one rank's."""
    ranks, config = case.ranks, case.model_def.config
    mine = jnp.zeros((tokens * ranks.expert, config.hidden_size), case.model_def.settings.dtype)
    all_rows = jnp.zeros((tokens * ranks.expert**2, config.hidden_size), mine.dtype)
    parts = [w for w in case.table if w.stack == "moe_layers" and in_parts(w, ranks)]
    values = sum(w.parameters // w.layers for w in parts)
    weights = jnp.zeros((values // ranks.expert // 1024 * ranks.expert, 1024), jnp.bfloat16)
    rows = PartitionSpec(EXPERT)

    def timed(function: Any, array: Any, out: PartitionSpec) -> float:
        array = jax.device_put(array, ranks.sharding(rows))
        repeated = jax.jit(ranks.run(function, (rows,), out))
        jax.block_until_ready(repeated(array))
        began = time.perf_counter()
        for _ in range(10):
            result = repeated(array)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / 10

    layers = config.num_moe_layers
    one = {
        "gather of rows": (timed(ranks.gather, mine, PartitionSpec()), GATHERS),
        "scatter of rows": (timed(ranks.scatter_sum, all_rows, rows), SCATTERS),
        "gather of weights": (timed(ranks.gather, weights, PartitionSpec()), WEIGHT_GATHERS),
    }
    return {name: seconds * count * layers for name, (seconds, count) in one.items()}


def batches(options: argparse.Namespace, vocabulary: int) -> list[dict[str, np.ndarray]]:
    """Random rows, the same for every case."""
    rng = np.random.default_rng(0)
    shape = (1, options.rows * options.ranks, options.length)
    positions = np.broadcast_to(np.arange(options.length, dtype=np.int32), shape)
    return [
        {
            "tokens": rng.integers(0, vocabulary, shape, np.int32),
            "loss_weights": np.ones(shape, np.float32),
            "positions": positions,
            "segment_ids": np.ones(shape, np.int32),
        }
        for _ in range(options.steps)
    ]


def main() -> None:
    """Runs every case and prints one JSON object a line, a summary last."""
    allow_jax_memory()
    parser = argparse.ArgumentParser(description="Several GPUs of one host against one.")
    parser.add_argument("--checkpoint", required=True, help="directory with a config.json")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, help="routed experts; as many as a token takes")
    parser.add_argument("--rows", type=int, default=4, help="of one device")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--cases", nargs="+", help="of: mesh, half, copies, one; all if not given")
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(json.dumps({"devices": len(jax.devices()), "kind": device, "jax": jax.__version__}))

    mesh = make_ranks(MeshSection(expert=options.ranks, expert_buffer=1.0))
    cases = [
        ("mesh", "mesh", mesh, 1),
        ("half", "mesh, half batches", mesh, 2),
        ("copies", "copies", Ranks(options.ranks, alone=True, buffer=1.0), 1),
        ("one", "one device", ONE_DEVICE, 1),
    ]
    found: dict[str, dict[str, Any]] = {}
    chosen = set(options.cases or ("mesh", "half", "copies", "one"))
    for short, name, ranks, halves in cases:
        if short not in chosen:
            continue
        case = Case(options, name, ranks, halves)
        rows = batches(options, case.model_def.config.vocab_size)
        found[name] = case.run(rows)
        if name == "mesh":
            found[name]["exchanges_s"] = exchange_seconds(case, options.rows * options.length)
        print(json.dumps(found[name]), flush=True)
        del case
    if "mesh" in found:
        print(json.dumps(summary(found)))


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Losses side by side, and how much of the exchanges' own time the step did not show."""
    alone = sum(found["mesh"]["exchanges_s"].values())
    result: dict[str, Any] = {"exchanges by themselves, s": alone}
    if "one device" in found:
        result["largest relative difference of losses, mesh to one device"] = max(
            abs(a - b) / b
            for a, b in zip(found["mesh"]["losses"], found["one device"]["losses"], strict=True)
        )
    for name in {"mesh", "mesh, half batches"} & found.keys() if "copies" in found else ():
        step = found[name]["step_s"]
        shown = max(0.0, step - found["copies"]["step_s"])
        result[name] = {
            "step_s": step,
            "exchanges shown, share of the step": shown / step,
            "exchanges hidden, share of their own time": max(0.0, 1 - shown / alone),
        }
    return result


if __name__ == "__main__":
    main()
