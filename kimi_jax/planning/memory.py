"""The plan of a run: what each device holds, whether it fits, and what it computes for a token."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_jax.config import RunConfig
from kimi_jax.config_file import load_config
from kimi_jax.errors import UserError
from kimi_jax.lora import AdapterPlan, plan_adapters
from kimi_jax.model.config import ModelConfig, load_model_config
from kimi_jax.model.layout import check_layout
from kimi_jax.model.params import Weight, weight_table
from kimi_jax.parallel.ranks import Ranks, abstract_ranks
from kimi_jax.planning.activations import Work, offloaded, phases, saved, workspace
from kimi_jax.planning.arrays import adapter_bytes, base_bytes, low_rank_columns, matrix_bytes
from kimi_jax.planning.flops import TokenFlops, active_parameters, token_flops
from kimi_jax.planning.gpus import DEFAULT, Gpu, find_gpu
from kimi_jax.weights.checkpoint import resolve_checkpoint

if TYPE_CHECKING:  # a picture is drawn when it is asked for
    from matplotlib.figure import Figure

ITEMSIZE = {"float32": 4, "bfloat16": 2}
# Outside of JAX's pool: CUDA context and libraries; and NCCL's buffers where devices are joined.
CONTEXT, NCCL = 2**30, 2 * 2**30
MOST_ROWS = 2**16
GRADIENTS = "gradients"
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Item:
    """Some bytes of one device. kind: weights, training, activations or reserve."""

    name: str
    kind: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Parameters:
    """Of the model: all, those that one token is multiplied by, and those of the adapters."""

    total: int
    active: int
    trained: int


@dataclass(frozen=True)
class MemoryPlan:
    """What one device of a run will hold, all devices alike.

    Attributes:
        device: the kind of device.
        capacity: its memory, bytes.
        expert: devices that share the experts.
        data: replicas of those.
        micro_batch: rows of one forward and backward pass, of all devices together.
        sequence_length: tokens of a row.
        items: what is held, largest moments added up; `total` is their sum.
        phase: the moment of the step that decides the workspace.
        phases: each moment's live terms, bytes by name.
        parameters: of the model.
        flops: of one token.
        largest_micro_batch: that still fits, of all devices; 0 if not one row a device does.
        offloaded: what one device keeps in its machine's memory between the passes, bytes by name.
    """

    device: str
    capacity: int
    expert: int
    data: int
    micro_batch: int
    sequence_length: int
    items: tuple[Item, ...]
    phase: str
    phases: Mapping[str, Mapping[str, int]]
    parameters: Parameters
    flops: TokenFlops
    largest_micro_batch: int
    offloaded: Mapping[str, int]

    @property
    def devices(self) -> int:
        """All of them."""
        return self.expert * self.data

    @property
    def total(self) -> int:
        """Bytes of one device, the reserve included."""
        return sum(item.bytes for item in self.items)

    @property
    def program(self) -> int:
        """Bytes of one device without the reserve: what the compiler's report adds up to."""
        return sum(item.bytes for item in self.items if item.kind != "reserve")

    @property
    def arguments(self) -> int:
        """Bytes of one device that stand from step to step: weights, adapters, moments."""
        standing = [item for item in self.items if item.kind in ("weights", "training")]
        return sum(item.bytes for item in standing if item.name != GRADIENTS)

    @property
    def host(self) -> int:
        """Bytes that one device keeps in its machine's memory."""
        return sum(self.offloaded.values())

    @property
    def fits(self) -> bool:
        """Whether the total is at most the device's memory."""
        return self.total <= self.capacity

    @property
    def tokens_per_device(self) -> int:
        """Of one forward and backward pass."""
        return self.micro_batch * self.sequence_length // self.devices

    @property
    def fraction(self) -> float:
        """The least part of the device's memory, in whole per cent, that JAX must be allowed."""
        return math.ceil(100 * self.program / self.capacity) / 100

    def to_json(self) -> dict[str, Any]:
        """Everything, as what `json.dumps` takes. Sizes are bytes."""
        return asdict(self) | {
            "devices": self.devices,
            "total": self.total,
            "program": self.program,
            "fits": self.fits,
            "tokens_per_device": self.tokens_per_device,
            "memory_fraction": self.fraction,
        }

    def figure(self) -> "Figure":
        """One bar a device, cut into its items, and the device's memory as a line."""
        from kimi_jax.planning.picture import draw

        return draw(self)


@dataclass(frozen=True)
class Sizing:
    """A run's structure without a value of it: what the bytes follow from.

    rows: of one device in a forward and backward pass.
    """

    config: RunConfig
    model: ModelConfig
    table: tuple[Weight, ...]
    adapters: AdapterPlan
    ranks: Ranks
    rows: int

    def items(self) -> tuple[Item, ...]:
        """What one device holds."""
        fp32 = adapter_bytes(self.adapters, self.ranks)
        trained = sum(fp32.values())
        work = self.work
        phase, live = workspace(work)
        kept = saved(work)
        weights = base_bytes(self.table, self.ranks)
        reserve = CONTEXT + (NCCL if self.ranks.count > 1 else 0)
        return (
            *(Item(name, "weights", size) for name, size in weights.items()),
            *(Item(name, "training", size, "fp32") for name, size in fp32.items()),
            Item(GRADIENTS, "training", trained, "fp32"),
            Item("optimizer moments", "training", 2 * trained, "fp32, two a parameter"),
            Item("saved activations", ACTIVATIONS, sum(kept.values()), ", ".join(kept)),
            Item("workspace", ACTIVATIONS, live, f"largest at: {phase}"),
            Item("reserve", "reserve", reserve, "CUDA context, libraries, NCCL"),
        )

    @property
    def work(self) -> Work:
        """One micro-batch on one device."""
        train = self.config.train
        one_layer, all_layers = matrix_bytes(self.table)
        return Work(
            config=self.model,
            ranks=self.ranks,
            rows=self.rows,
            length=train.sequence_length,
            itemsize=ITEMSIZE[self.config.model.dtype],
            recompute=train.recompute,
            keep=tuple(train.keep),
            offload=tuple(train.offload),
            low_rank=low_rank_columns(self.adapters, experts=False),
            expert_low_rank=low_rank_columns(self.adapters, experts=True),
            chunk=train.loss_chunk,
            adapters=sum(adapter_bytes(self.adapters, self.ranks).values()),
            layer_weights=one_layer,
            matrices=all_layers,
        )

    def largest_rows(self, capacity: int) -> int:
        """Most rows of one device whose total is at most `capacity` bytes."""

        fixed = sum(item.bytes for item in self.items() if item.kind != ACTIVATIONS)
        work = self.work

        def fits(rows: int) -> bool:
            other = replace(work, rows=rows)
            return fixed + sum(saved(other).values()) + workspace(other)[1] <= capacity

        low, high = 0, 1
        while high <= MOST_ROWS and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def plan(
    config: str | Path | Mapping[str, Any] | RunConfig,
    device: str | Gpu = DEFAULT,
    devices: int | None = None,
) -> MemoryPlan:
    """Plans a run. Reads the configuration and the checkpoint's `config.json`, nothing else.

    Args:
        config: a YAML file's path, a nested dictionary, or a `RunConfig`.
        device: a kind of GPU, or its memory like `96GB`.
        devices: as many in place of `mesh.data` × `mesh.expert`; see `on_devices`.

    Raises:
        UserError: a bad configuration, a mesh that cannot divide the model, an unknown device.
    """
    settings = load_config(config)
    if devices is not None:
        settings = on_devices(settings, devices)
    gpu = find_gpu(device) if isinstance(device, str) else device
    return plan_sizing(sizing_of(settings, read_architecture(settings)), gpu)


def read_architecture(config: RunConfig) -> ModelConfig:
    """The checkpoint's `config.json`; its weights need not be there."""
    return load_model_config(resolve_checkpoint(config.model.checkpoint))


def on_devices(config: RunConfig, devices: int) -> RunConfig:
    """The same run on another number of devices, which all share the experts; as many rows on each."""
    if devices < 1:
        raise UserError(f"{devices} devices; required: at least 1")
    rows = config.train.micro_batch // (config.mesh.expert * config.mesh.data)
    values = config.model_dump()
    values["mesh"] |= {"expert": devices, "data": 1}
    values["train"] |= {"micro_batch": rows * devices}
    return load_config(values)


def sizing_of(config: RunConfig, model: ModelConfig) -> Sizing:
    """The structure of a run.

    Raises:
        UserError: a mesh over which experts or vocabulary cannot be divided, or bad adapter targets.
    """
    table, ranks = weight_table(model), abstract_ranks(config.mesh)
    check_layout(table, ranks)
    rows = config.train.micro_batch // ranks.count
    return Sizing(config, model, table, plan_adapters(config.lora, table), ranks, rows)


def plan_sizing(sizing: Sizing, gpu: Gpu) -> MemoryPlan:
    """The plan of a structure on a kind of device."""
    train = sizing.config.train
    return MemoryPlan(
        device=gpu.device_kind,
        capacity=gpu.memory,
        expert=sizing.ranks.expert,
        data=sizing.ranks.data,
        micro_batch=sizing.rows * sizing.ranks.count,
        sequence_length=train.sequence_length,
        items=sizing.items(),
        phase=workspace(sizing.work)[0],
        phases=phases(sizing.work),
        parameters=Parameters(
            sum(weight.parameters for weight in sizing.table),
            active_parameters(sizing.table, sizing.model),
            sum(adapter.parameters for adapter in sizing.adapters.values()),
        ),
        flops=token_flops(
            sizing.table,
            sizing.model,
            train.recompute,
            train.sequence_length,
            train.spared,
        ),
        largest_micro_batch=sizing.largest_rows(gpu.memory) * sizing.ranks.count,
        offloaded=offloaded(sizing.work),
    )
