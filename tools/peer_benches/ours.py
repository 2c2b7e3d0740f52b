"""kimi_jax: the model's own mixture-of-experts layer in its own loop over layers, forward and backward.

Random values for all adapters and for the output's gradient.
Gradients are those of the adapters and of the layer's input.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kimi_jax.config import RunConfig
from kimi_jax.config_file import load_config
from kimi_jax.kernels.hopper import compiler_options
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.layer import Layer, scan_stack
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.ranks import abstract_ranks
from kimi_jax.planning.memory import read_architecture
from kimi_jax.training.structure import model_of
from tools.peer_benches.case import SCALE, Case, Sizes, assignments_here, useful_operations
from tools.random_base import factor_shapes, random_base

GIB = 2**30
WARM_UP = 2
KERNELS = "mosaic_gpu"  # of the program that has the Hopper kernels in it


NOTHING = ("train.recompute=none", "train.keep=[]", "train.offload=[]")


def measure(case: Case) -> dict[str, Any]:
    """The layer by itself, with nothing computed twice; and as the recipe recomputes it in a deep model."""
    recipe = run_config(case)
    again = measure_as(recipe, case)
    alone = measure_as(run_config(replace(case, overrides=(*case.overrides, *NOTHING))), case)
    kept = ", ".join(recipe.train.keep) or "nothing"
    return alone | {
        "recomputed": {name: again[name] for name in ("ms", "peak_gib", "seconds_to_compile")},
        "how": f"nothing recomputed; as the recipe: recompute {recipe.train.recompute}, keep {kept}",
    }


def measure_as(config: RunConfig, case: Case) -> dict[str, Any]:
    """Makes the layer, compiles it, runs it."""
    model_def = one_layer(config, read_architecture(config))
    base, adapters = random_base(model_def), random_adapters(model_def)
    x, dy = random_rows(case, model_def)
    began = perf_counter()
    program = jax.jit(layer_gradients(model_def), compiler_options=compiler_options())
    program = program.lower(adapters, base, x, dy).compile()
    compiling = perf_counter() - began
    took, (y, gradients, loads) = timed(program, (adapters, base, x, dy), case.calls)
    for leaf in jax.tree.leaves((y, gradients)):
        assert bool(jnp.isfinite(leaf).all()), "a result is not finite"
    chosen = tuple(np.asarray(loads)[-1].tolist())
    here = assignments_here(chosen, case.ranks)
    model = model_def.config
    sizes = Sizes(**{name: getattr(model, name) for name in Sizes.__dataclass_fields__})
    return {
        "ms": took,
        "peak_gib": total_bytes(program) / GIB,
        "operations": useful_operations(sizes, case.tokens, here),
        "loads": chosen,
        "assignments": here,
        "kernels": "Hopper" if KERNELS in (program.as_text() or "") else "reference",
        "seconds_to_compile": compiling,
        "peak_of_process_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        / GIB,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax")},
    }


def run_config(case: Case) -> RunConfig:
    """The recipe, for as many sequences and GPUs as the case has."""
    changes = {
        "model.checkpoint": case.config,
        "lora.rank": case.rank,
        "lora.alpha": SCALE * case.rank,
        "lora.targets": "[attention, shared, routed]",
        "train.micro_batch": case.batch * case.ranks,
        "train.sequence_length": case.length,
        "mesh.expert": case.ranks,
        # Whole, as the peer has them. It also gives one rank alone a router that knows all experts.
        "mesh.rest": "replicated",
    }
    given = [f"{key}={value}" for key, value in changes.items()]
    return load_config(case.recipe, [*given, *case.overrides])


def one_layer(config: RunConfig, model: ModelConfig) -> ModelDef:
    """A model with one mixture-of-experts layer and no dense one; alone among the run's ranks."""
    model = replace(model, num_hidden_layers=1, first_k_dense_replace=0)
    return model_of(config, model, abstract_ranks(config.mesh))


def random_adapters(model_def: ModelDef) -> dict[str, Array]:
    """This rank's factors, on the device."""
    adapters = {}
    for number, (path, shape) in enumerate(factor_shapes(model_def).items()):
        typical = shape[-1] ** -0.5 if path.endswith("lora_A") else 0.1 * shape[-1] ** -0.5
        adapters[path] = typical * jax.random.normal(jax.random.key(number, impl="rbg"), shape)
    return adapters


def random_rows(case: Case, model_def: ModelDef) -> tuple[Array, Array]:
    """A residual stream before the layer, and the gradient of the one after it."""
    shape = (case.batch, case.length, model_def.config.hidden_size)
    keys = jax.random.split(jax.random.key(0, impl="rbg"))
    x, dy = (jax.random.normal(key, shape, model_def.settings.dtype) for key in keys)
    return x, dy


def layer_gradients(model_def: ModelDef) -> Callable[..., Any]:
    """`(adapters, base, x, dy) -> (y, gradients of adapters and x, loads [1, E])`."""

    def compute(adapters: Any, base: Any, x: Array, dy: Array) -> Any:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        segments = jnp.ones(x.shape[:2], jnp.int32)

        def apply(layer: Layer, x: Array, _: None, number: Array) -> tuple[Array, Array]:
            return layer(x, positions, segments, number)

        def forward(adapters: Any, x: Array) -> tuple[Array, Array]:
            stack = model_def.bind(base, adapters).moe_layers
            assert stack is not None
            settings = model_def.settings
            return scan_stack(stack, apply, x, None, *settings.recomputed)

        y, pullback, loads = jax.vjp(forward, adapters, x, has_aux=True)
        return y, pullback(dy), loads

    return compute


def timed(program: Any, operands: Any, calls: int) -> tuple[float, Any]:
    """Median milliseconds of a call, each waited for, and its result."""
    result = None
    for _ in range(WARM_UP):
        result = jax.block_until_ready(program(*operands))
    times = []
    for _ in range(calls):
        del result
        began = perf_counter()
        result = jax.block_until_ready(program(*operands))
        times.append(1e3 * (perf_counter() - began))
    return median(times), result


def total_bytes(program: Any) -> int:
    """Arguments, results and temporaries together, as the compiler laid them out."""
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return kept + memory.temp_size_in_bytes - memory.alias_size_in_bytes
