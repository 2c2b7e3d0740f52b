"""Bytes per device of what lives from step to step: the base, the adapters, their gradients and moments.

Shapes and places are those that import and training use (`model.layout`, `lora`, `parallel`).
"""

import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from kimi_jax.lora import AdapterPlan, adapter_shapes
from kimi_jax.model.layout import BaseArray, adapter_specs, base_arrays
from kimi_jax.model.params import BYTES, Weight
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.parallel.sharding import local_shape

PACKED, SCALES, OTHER, ENDS = "packed experts", "scales", "other weights", "embedding and head"
EXPERT_ADAPTERS, ADAPTERS = "adapters of experts", "other adapters"
FP32 = 4


def local_count(name: str, shape: tuple[int, ...], spec: PartitionSpec, ranks: Ranks) -> int:
    """Values of one rank's part of an array."""
    return math.prod(local_shape(name, shape, spec, ranks.mesh_shape))


def bytes_of(array: BaseArray, ranks: Ranks) -> int:
    """Bytes of one rank's part of an array of the base."""
    count = local_count(array.path, array.shape, array.spec, ranks)
    if array.leaf == "values":
        return count // 2
    if array.leaf == "scale":
        return count * BYTES["bf16"]
    assert array.weight.storage != "int4"
    return count * BYTES[array.weight.storage]


def base_bytes(table: Sequence[Weight], ranks: Ranks) -> dict[str, int]:
    """Bytes of the base on one device, by group; experts that are not packed count as `PACKED`."""
    groups: dict[str, int] = dict.fromkeys((PACKED, SCALES, OTHER, ENDS), 0)
    for array in base_arrays(table, ranks).values():
        groups[_group(array)] += bytes_of(array, ranks)
    return groups


def matrix_bytes(table: Sequence[Weight]) -> tuple[int, int]:
    """Bytes of layers' matrices but the experts', whole: of one layer with experts (or dense), of all."""
    one, total = {"dense_layers": 0, "moe_layers": 0}, 0
    for weight in table:
        if weight.stack and weight.role != "routed" and len(weight.shape) > 1:
            one[weight.stack] += weight.bytes // weight.layers
            total += weight.bytes
    return one["moe_layers"] or one["dense_layers"], total


def adapter_bytes(plan: AdapterPlan, ranks: Ranks) -> dict[str, int]:
    """Bytes of the fp32 adapters on one device, by group."""
    groups: dict[str, int] = dict.fromkeys((EXPERT_ADAPTERS, ADAPTERS), 0)
    shapes, specs = adapter_shapes(plan), adapter_specs(plan)
    for path, adapter in plan.items():
        group = EXPERT_ADAPTERS if adapter.weight.role == "routed" else ADAPTERS
        for factor in adapter.shapes():
            name = f"{path}.{factor}"
            groups[group] += FP32 * local_count(name, shapes[name], specs[name], ranks)
    return groups


def low_rank_columns(plan: AdapterPlan, experts: bool) -> int:
    """Columns of x · Aᵀ of all layers' adapters: of experts', or of all others."""
    chosen = [a for a in plan.values() if a.weight.stack and (a.weight.role == "routed") == experts]
    return sum(adapter.rank * adapter.weight.layers for adapter in chosen)


def sharding_lines(table: Sequence[Weight], plan: AdapterPlan, ranks: Ranks) -> list[str]:
    """One line for each array of base and adapters: path, shape, dtype, spec, a rank's shape and bytes."""
    rows = []
    for array in base_arrays(table, ranks).values():
        dtype = {"values": "int4", "scale": "bf16"}.get(array.leaf, array.weight.storage)
        size = bytes_of(array, ranks)
        rows.append((array.path, array.shape, dtype, array.spec, size))
    specs = adapter_specs(plan)
    for path, shape in adapter_shapes(plan).items():
        size = FP32 * local_count(path, shape, specs[path], ranks)
        rows.append((path, shape, "fp32", specs[path], size))
    lines = []
    for path, shape, dtype, spec, size in rows:
        local = local_shape(path, shape, spec, ranks.mesh_shape)
        names = ",".join(str(name or "-") for name in (*spec, *[None] * (len(shape) - len(spec))))
        lines.append(f"{path} {_dims(shape)} {dtype} {names} {_dims(local)} {size}")
    return lines


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _group(array: BaseArray) -> str:
    if array.leaf == "scale":
        return SCALES
    role = array.weight.role
    if role == "routed":
        return PACKED
    return ENDS if role in ("embedding", "head") else OTHER
