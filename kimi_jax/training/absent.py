"""Compiles the real train step for GPUs that are not there, and tells what the compiler says.

XLA compiles for a description of a device (`assets/targets`); the CUDA plugin must be installed, a
GPU need not be. Nothing is allocated: the step's arguments are shapes with their places on a mesh.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import PartitionSpec, SingleDeviceSharding, use_abstract_mesh

from kimi_jax.config import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.kernels.hopper import compiler_options
from kimi_jax.kernels.target import compiling_for
from kimi_jax.model.config import ModelConfig
from kimi_jax.parallel.ranks import MICRO_BATCHES, REPLICATED, Ranks, abstract_ranks, make_ranks
from kimi_jax.parallel.sharding import local_shape
from kimi_jax.planning.compiled import CompiledStep
from kimi_jax.planning.gpus import DEFAULT, Gpu, find_gpu
from kimi_jax.planning.hlo import collectives
from kimi_jax.planning.memory import read_architecture
from kimi_jax.training.loss import BATCH_FIELDS
from kimi_jax.training.optimizer import make_optimizer
from kimi_jax.training.step import TrainState, make_train_step
from kimi_jax.training.structure import model_of

FIELD_DTYPES = {
    field: jnp.float32 if field == "loss_weights" else jnp.int32 for field in BATCH_FIELDS
}


def absent_devices(gpu: Gpu, machines: int, per_machine: int) -> list[Any]:
    """Devices of a kind that need not exist: to compile for, not to run on.

    Raises:
        UserError: no description of that kind, or no CUDA plugin.
    """
    if gpu.target_config is None:
        raise UserError(
            f"there is no description of {gpu.name} to compile for; known: H200. Leave --compile out"
        )
    if not any(Path("/dev").glob("nvidia*")):
        # With no GPU to run on, looking for one makes the CUDA plugin withdraw, compiler and all.
        jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.get_topology_desc(
            topology_name="",
            platform="cuda",
            target_config=gpu.target_config,
            topology=f"1x{machines}x{per_machine}",
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"compiling for {gpu.name} needs JAX's CUDA plugin: pip install 'kimi_jax[cuda]' "
            "(a GPU is not needed; if there is none and the plugin is installed, set JAX_PLATFORMS=cpu). "
            f"JAX says: {error}"
        ) from error
    return list(topology.devices)


def abstract_step(
    config: RunConfig, model: ModelConfig, ranks: Ranks, device: Any | None = None
) -> tuple[Any, tuple[TrainState, dict[str, Any], dict[str, Any], Any]]:
    """The jitted train step of a run, and its arguments as shapes with their places.

    Args:
        config: of the run.
        model: the checkpoint's.
        ranks: of the run, on devices that may be absent.
        device: the one device, where the ranks have no mesh; None: the first that JAX sees. Of a rank
            alone, the arguments are its parts and its rows.
    """
    train, model_def = config.train, model_of(config, model, ranks)
    optimizer = make_optimizer(train)
    alone = None if device is None else SingleDeviceSharding(device)

    def place(leaf: Any, spec: PartitionSpec) -> Any:
        shape = leaf.shape
        if ranks.mesh is None:
            shape = local_shape("an argument of the step", shape, spec, ranks.mesh_shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=ranks.sharding(spec) or alone)

    def place_all(leaves: Mapping[str, Any], specs: Mapping[str, PartitionSpec]) -> dict[str, Any]:
        return {path: place(leaf, specs[path]) for path, leaf in leaves.items()}

    adapters = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in model_def.adapter_shapes.items()
    }
    opt_state = optax.tree.map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, adapters),
        dict(model_def.adapter_specs),
        transform_non_params=lambda leaf: place(leaf, REPLICATED),
    )
    counter = place(jax.ShapeDtypeStruct((), jnp.int32), REPLICATED)
    state = TrainState(place_all(adapters, model_def.adapter_specs), opt_state, counter)
    shape = (train.accumulate, train.micro_batch, train.sequence_length)
    batch = {
        field: place(jax.ShapeDtypeStruct(shape, dtype), MICRO_BATCHES)
        for field, dtype in FIELD_DTYPES.items()
    }
    base = place_all(model_def.base_shapes, model_def.base_specs)
    after = place(jax.ShapeDtypeStruct((), jnp.bool_), REPLICATED)
    return make_train_step(model_def, optimizer, train.loss_chunk), (state, base, batch, after)


def compile_run(config: RunConfig, device: str, topology: str | None = None) -> CompiledStep:
    """Compiles the step of a run for as many absent devices as its mesh has.

    Args:
        config: of the run.
        device: a kind of GPU.
        topology: `machines x GPUs`, as `1x8`; None: `mesh.data` machines of `mesh.expert`.

    Raises:
        UserError: see `absent_devices`, or a topology of another number of devices.
    """
    gpu = find_gpu(device)
    devices = absent_devices(gpu, *_stand(config, topology))
    ranks = make_ranks(config.mesh, devices)
    return compile_step(config, read_architecture(config), ranks, gpu, devices[0])[0]


def compile_alone(
    config: RunConfig, model: ModelConfig, device: str = DEFAULT
) -> tuple[CompiledStep, str]:
    """Compiles the step of one rank of a run alone, on one absent device: for counting, see `Ranks`.

    Args:
        config: of the run.
        model: the checkpoint's.
        device: a kind of GPU.

    Returns:
        The report, and the optimised program's text.

    Raises:
        UserError: see `absent_devices`.
    """
    gpu = find_gpu(device)
    (alone,) = absent_devices(gpu, 1, 1)
    return compile_step(config, model, abstract_ranks(config.mesh), gpu, alone)


def compile_step(
    config: RunConfig, model: ModelConfig, ranks: Ranks, gpu: Gpu, device: Any | None = None
) -> tuple[CompiledStep, str]:
    """Compiles the step of a run for the devices of its ranks' mesh, or for one device.

    Args:
        config: of the run.
        model: the checkpoint's.
        ranks: of the run, on devices of that kind.
        gpu: the kind.
        device: the one device, where the ranks have no mesh.

    Returns:
        The report, and the optimised program's text.
    """
    assert ranks.mesh is not None or device is not None
    step, arguments = abstract_step(config, model, ranks, device)
    began = time.perf_counter()
    mesh = nullcontext() if ranks.mesh is None else use_abstract_mesh(ranks.mesh.abstract_mesh)
    with compiling_for(gpu.device_kind), mesh:
        lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
        middle = time.perf_counter()
        compiled = lowered.compile(compiler_options=compiler_options())
    seconds = (middle - began, time.perf_counter() - middle)
    text = compiled.as_text()
    return report_of(compiled, text, gpu.device_kind, seconds), text


def report_of(compiled: Any, text: str, target: str, seconds: tuple[float, float]) -> CompiledStep:
    """What a compiled step says about itself; `text` is its optimised program."""
    memory = compiled.memory_analysis()
    return CompiledStep(
        target=target,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        seconds=seconds,
        exchanges=tuple(collectives(text)),
        implementation=_kernels_in(text),
    )


def _kernels_in(text: str) -> str:
    """Whether the program multiplies by packed experts with the Hopper kernels."""
    if "mosaic_gpu" in text:
        return "Compiled with the Hopper kernels."
    return "Compiled with the reference kernels, which need more memory than the Hopper kernels."


def _stand(config: RunConfig, topology: str | None) -> tuple[int, int]:
    data, expert = config.mesh.data, config.mesh.expert
    if topology is None:
        return data, expert
    machines, _, gpus = topology.partition("x")
    if (
        not (machines.isdecimal() and gpus.isdecimal())
        or int(machines) * int(gpus) != data * expert
    ):
        raise UserError(
            f"--topology {topology!r}: required: machines x GPUs, as many together as mesh.data × "
            f"mesh.expert = {data} × {expert}; for example {data}x{expert}"
        )
    return int(machines), int(gpus)
