"""A run's ranks on the devices at hand, one alone or all: their structure, values, compiled step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.config import RunConfig
from kimi_jax.config_file import load_config
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight, weight_table
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.mesh import EXPERT
from kimi_jax.parallel.ranks import Ranks, abstract_ranks
from kimi_jax.planning.compiled import CompiledStep
from kimi_jax.planning.gpus import DEFAULT, Gpu, find_gpu, known_gpus
from kimi_jax.planning.memory import MemoryPlan, plan_sizing, sizing_of
from kimi_jax.training.absent import report_of
from kimi_jax.training.kept import KeptProgram
from kimi_jax.training.optimizer import make_optimizer
from kimi_jax.training.programs import Programs
from kimi_jax.training.step import TrainState, init_state
from kimi_jax.training.structure import model_of
from tools.random_base import factor_shapes, random_base


@dataclass(frozen=True)
class Rank:
    """The ranks of a run that are measured: all of them on a mesh, or one of them alone.

    What a rank alone would receive from the others is made of copies of its own.
    """

    config: RunConfig
    model: ModelConfig
    model_def: ModelDef
    ranks: Ranks
    table: tuple[Weight, ...]

    @property
    def here(self) -> int:
        """Ranks at hand: one alone, or all."""
        return 1 if self.ranks.alone else self.ranks.count

    @property
    def rows(self) -> int:
        """Of one rank, in a micro-batch."""
        return self.config.train.micro_batch // self.ranks.count

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.config.train.sequence_length

    @property
    def tokens(self) -> int:
        """Of one rank in a micro-batch, padding included."""
        return self.rows * self.length

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A batch of the ranks at hand, [micro-batches, B, T], on their devices."""
        if self.ranks.alone:  # `put_batch` would leave it one rank's part of its own rows
            return jax.device_put(dict(batch))
        return self.ranks.put_batch(batch)

    def program(self) -> KeptProgram:
        """The real train step, of (state, base, batch, after)."""
        return Programs(self.model_def, self.config.train).train_step

    def plan(self) -> MemoryPlan:
        """Of one rank, on the GPU at hand if it is known."""
        return plan_sizing(sizing_of(self.config, self.model), this_gpu())

    def report(self, compiled: Any) -> CompiledStep:
        """What the compiler says."""
        return report_of(compiled, compiled.as_text(), jax.devices()[0].device_kind, (0.0, 0.0))


def make_rank(config: RunConfig, model: ModelConfig, ranks: Ranks | None = None) -> Rank:
    """The ranks of a run's configuration; if they are not given, the one that this device plays."""
    ranks = ranks or abstract_ranks(config.mesh)
    return Rank(config, model, model_of(config, model, ranks), ranks, weight_table(model))


def with_rows(config: RunConfig, length: int, tokens: int) -> RunConfig:
    """The same run with rows of `length`: as many as make `tokens` on each device, at least one.

    A single row is not cut in halves.
    """
    values = config.model_dump()
    devices = config.mesh.expert * config.mesh.data
    rows = max(1, tokens // length)
    values["train"] |= {"sequence_length": length, "micro_batch": rows * devices}
    values["mesh"]["half_batches"] = min(rows, config.mesh.half_batches)
    return load_config(values)


def make_state(rank: Rank) -> TrainState:
    """The ranks' factors, A small and B zero, and an optimizer that has made no update."""
    ranks, specs = rank.ranks, dict(rank.model_def.adapter_specs)

    def adapters() -> dict[str, Any]:
        made = {}
        for number, (path, shape) in enumerate(factor_shapes(rank.model_def).items()):
            key = jax.random.key(number, impl="rbg")
            if EXPERT in specs[path]:  # no two ranks' parts are alike
                key = jax.random.fold_in(key, ranks.index())
            small = path.endswith("lora_A")
            made[path] = 0.01 * jax.random.normal(key, shape) if small else jnp.zeros(shape)
        return made

    made = jax.jit(ranks.run(adapters, (), specs))()
    return init_state(made, make_optimizer(rank.config.train), ranks)


def make_base(rank: Rank) -> dict[str, Any]:
    """Random base weights in their packed format, made on the devices."""
    return jax.block_until_ready(random_base(rank.model_def))


def this_gpu() -> Gpu:
    """What is at hand if the plan knows it, or the plan's default."""
    kind = jax.devices()[0].device_kind
    return next((gpu for gpu in known_gpus() if gpu.device_kind == kind), find_gpu(DEFAULT))
