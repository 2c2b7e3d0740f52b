"""The same run on other devices: what fits on how many of each kind."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kimi_jax.config import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.model.config import ModelConfig
from kimi_jax.planning.gpus import Gpu, known_gpus
from kimi_jax.planning.memory import Sizing, on_devices, sizing_of

COUNTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Option:
    """So many devices of a kind, all of them sharing the experts.

    needed: bytes of one device with the run's own rows a device. largest_rows: a device, that fit; 0
    if none do. machines: that the devices usually stand in.
    """

    device: str
    capacity: int
    devices: int
    machines: int
    needed: int
    largest_rows: int

    @property
    def fits(self) -> bool:
        """Whether the run as it is fits."""
        return self.needed <= self.capacity

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        return asdict(self) | {"fits": self.fits}


def options(config: RunConfig, model: ModelConfig) -> tuple[Option, ...]:
    """Each known kind, and each number of devices that can divide the model."""
    return tuple(_options(config, model))


def _options(config: RunConfig, model: ModelConfig) -> Iterator[Option]:
    for count in COUNTS:
        try:
            sizing = sizing_of(on_devices(config, count), model)
        except UserError:  # experts or vocabulary that so many devices cannot share
            continue
        needed = sum(item.bytes for item in sizing.items())
        for gpu in known_gpus():
            yield _option(sizing, gpu, count, needed)


def _option(sizing: Sizing, gpu: Gpu, count: int, needed: int) -> Option:
    machines = -(-count // gpu.node)
    return Option(gpu.name, gpu.memory, count, machines, needed, sizing.largest_rows(gpu.memory))
