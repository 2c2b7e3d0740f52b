"""What is measured on as many GPUs as there are: the run, its model, and in words what it is not."""

import shutil
import subprocess
from dataclasses import dataclass, replace
from typing import Any

from kimi_jax.config import RunConfig
from kimi_jax.config_file import load_config
from kimi_jax.errors import UserError
from kimi_jax.lora import plan_adapters
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import weight_table
from kimi_jax.planning.memory import on_devices, read_architecture

BYTES_TRAINED = 3 * 4  # of a parameter in a checkpoint: its value and two moments, fp32


@dataclass(frozen=True)
class Node:
    """A run cut to the GPUs of one node, each of which holds and computes what one of the recipe's would.

    missing: in words, what makes it less than the recipe's model; none if it is whole.
    """

    config: RunConfig
    model: ModelConfig
    missing: tuple[str, ...]

    @property
    def devices(self) -> int:
        """GPUs, which all share the experts."""
        return self.config.mesh.expert

    @property
    def trained(self) -> int:
        """Parameters of the adapters."""
        plan = plan_adapters(self.config.lora, weight_table(self.model))
        return sum(adapter.parameters for adapter in plan.values())

    @property
    def saved_bytes(self) -> int:
        """Of a training checkpoint."""
        return BYTES_TRAINED * self.trained

    @property
    def parameters(self) -> int:
        """Of the base."""
        return sum(weight.parameters for weight in weight_table(self.model))

    def describe(self) -> str:
        """In a sentence."""
        model, train = self.model, self.config.train
        rows = train.micro_batch // self.devices
        return (
            f"{self.devices} GPUs, {model.num_hidden_layers} layers, {model.n_routed_experts} experts a "
            f"layer ({model.n_routed_experts // self.devices} on each GPU), {self.parameters / 1e9:,.0f} "
            f"billion parameters, {self.trained / 1e9:.2f} billion trained; "
            f"{rows} × {train.sequence_length} tokens a GPU, {train.accumulate} micro-batches a step"
        )

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        return {
            "whole_model": not self.missing,
            "missing": list(self.missing),
            "devices": self.devices,
            "layers": self.model.num_hidden_layers,
            "experts_a_layer": self.model.n_routed_experts,
            "parameters": self.parameters,
            "trained": self.trained,
            "saved_bytes": self.saved_bytes,
            "config": self.config.model_dump(mode="json"),
        }


def cut(
    recipe: RunConfig, devices: int | None, experts_a_rank: int | None, layers: int | None
) -> Node:
    """The node's run.

    Args:
        recipe: of the run; `mesh.data` replicas are left out.
        devices: GPUs; None: as many as the recipe shares experts over, or as there are if fewer.
        experts_a_rank: routed experts of a layer on each GPU; None: as the recipe's GPUs have.
        layers: instead of the checkpoint's.

    Raises:
        UserError: no such number, or a bad configuration.
    """
    model = whole = read_architecture(recipe)
    wanted = recipe.mesh.expert
    given = {"--devices": devices, "--experts-a-rank": experts_a_rank, "--layers": layers}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; required: at least 1")
    devices = devices or min(wanted, visible_gpus() or wanted)
    here = experts_a_rank or model.n_routed_experts // wanted
    model = replace(model, n_routed_experts=here * devices)
    if layers is not None:
        model = replace(model, num_hidden_layers=layers)
    if model.num_experts_per_tok > model.n_routed_experts:
        raise UserError(
            f"{devices} GPUs × {here} experts are fewer than the {model.num_experts_per_tok} that each "
            "token takes; required: a larger --experts-a-rank or more --devices"
        )
    missing = []
    if model.n_routed_experts != whole.n_routed_experts:
        missing.append(
            f"{model.n_routed_experts} of {whole.n_routed_experts} experts a layer, {here} on each GPU"
        )
    if model.num_hidden_layers != whole.num_hidden_layers:
        missing.append(f"{model.num_hidden_layers} of {whole.num_hidden_layers} layers")
    if devices != wanted:
        missing.append(f"{devices} GPUs exchange rows and weights, where the recipe has {wanted}")
    if devices == wanted and recipe.mesh.data == 1:
        return Node(load_config(recipe), model, tuple(missing))
    return Node(on_devices(recipe, devices), model, tuple(missing))


def visible_gpus() -> int:
    """As the driver lists them, without starting JAX; 0 if there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
