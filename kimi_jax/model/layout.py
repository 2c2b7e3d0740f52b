"""Where every array of the model lives on a mesh: the weight table's rows and their adapters."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from jax.sharding import PartitionSpec

from kimi_jax.errors import UserError, listing
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.params import Weight, scale_shape
from kimi_jax.parallel.mesh import EXPERT
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.parallel.sharding import RULES, partition

Leaf = Literal["value", "values", "scale"]


class BaseArray(NamedTuple):
    """One array of the base tree. shape: with the stack's layers in front, if it stands in one."""

    path: str
    weight: Weight
    leaf: Leaf
    shape: tuple[int, ...]
    spec: PartitionSpec


def in_parts(weight: Weight, ranks: Ranks) -> bool:
    """Whether a weight that is not split by expert or vocabulary is stored by rows over the ranks.

    Vectors stay whole, and so do weights whose rows cannot be divided.
    """
    if ranks.expert == 1 or ranks.rest == "replicated":
        return False
    named = weight.role in ("routed", "embedding", "head")
    return not named and len(weight.shape) == 2 and weight.shape[0] % ranks.expert == 0


def base_arrays(table: Sequence[Weight], ranks: Ranks) -> dict[str, BaseArray]:
    """Every array of the base tree, by path."""
    return {array.path: array for weight in table for array in _arrays(weight, ranks)}


def check_layout(table: Sequence[Weight], ranks: Ranks) -> None:
    """Refuses a number of ranks over which experts or vocabulary cannot be divided.

    Raises:
        UserError: with every dimension that cannot.
    """
    problems = {}
    for array in base_arrays(table, ranks).values():
        for size, axis in zip(array.shape, array.spec, strict=True):
            if axis == EXPERT and size % ranks.expert:
                kind = (
                    "routed experts" if array.weight.role == "routed" else "rows of the vocabulary"
                )
                problems[f"{size} {kind}"] = f"{size} / {ranks.expert} = {size / ranks.expert:.2f}"
    if problems:
        raise UserError(
            listing(
                f"mesh.expert = {ranks.expert} cannot carry this checkpoint",
                [f"{what} cannot be divided evenly: {sum_}" for what, sum_ in problems.items()],
                "Set mesh.expert to a divisor of all of them.",
            )
        )


def adapter_specs(plan: AdapterPlan) -> dict[str, PartitionSpec]:
    """The spec of every factor, by path: experts' and the vocabulary's live with their weights."""
    specs = {}
    for path, adapter in plan.items():
        *experts, out_dim, in_dim = adapter.weight.axes.split()
        for factor, shape in adapter.shapes().items():
            dims = ["r", in_dim] if factor == "lora_A" else [out_dim, "r"]
            lead = ["L"] if adapter.weight.stack else []
            own = experts if len(shape) == len(lead) + len(experts) + 2 else []
            specs[f"{path}.{factor}"] = partition(" ".join([*lead, *own, *dims]))
    return specs


def _arrays(weight: Weight, ranks: Ranks) -> Iterator[BaseArray]:
    rows = EXPERT if in_parts(weight, ranks) else None
    lead: list[str | None] = [None] if weight.stack else []
    # Every rank routes its own rows among all experts: E is no expert's place in a router.
    rules = {} if weight.role == "router" else RULES

    def stacked(axes: str) -> PartitionSpec:
        return PartitionSpec(*lead, *partition(axes, rules, rows))

    path, shape = weight.path, weight.stacked_shape
    if weight.storage == "int4":
        experts, out_dim, _ = weight.axes.split()
        yield BaseArray(f"{path}.values", weight, "values", shape, stacked(weight.axes))
        scale_axes = f"{experts} G {out_dim}"
        yield BaseArray(f"{path}.scale", weight, "scale", scale_shape(shape), stacked(scale_axes))
    else:
        place = path if weight.role in ("embedding", "router") else f"{path}.weight"
        yield BaseArray(place, weight, "value", shape, stacked(weight.axes))
