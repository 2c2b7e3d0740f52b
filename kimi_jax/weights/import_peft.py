"""Adapters in, from PEFT directories in either layout: see `peft_layout`.

Names, shapes and ranks are matched on both sides before a factor is read. Layers and experts are
stacked in memory, so an adapter must cover all layers and all experts of a projection, with one rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_jax.errors import MissingFileError, UserError, listing
from kimi_jax.lora import FACTORS, Adapter, adapter_shapes
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight
from kimi_jax.weights.names import PEFT_PREFIX, module_name, peft_name
from kimi_jax.weights.peft_config import TENSORS, PeftSettings, read_settings
from kimi_jax.weights.peft_layout import (
    DOWN,
    GATE,
    GATE_UP,
    HEAD,
    INNER,
    UP,
    Factors,
    experts_module,
    is_block_diagonal,
    split_gate_up,
    unfold,
)
from kimi_jax.weights.reader import Entry, read_header

_DTYPES = ("F32", "BF16", "F16")  # widening is exact


class _Module(NamedTuple):
    """One module that a file may adapt: its name, the sizes of its factors, where they go."""

    name: str
    weight: Weight
    layer: int
    expert: int | None
    out_size: int
    in_size: int
    folded: int = 1  # experts folded into the two factors


class _Group(NamedTuple):
    """The modules that are stacked together, by layer and expert, and their rank and alpha."""

    modules: list[_Module]
    rank: int
    alpha: float


def read_peft(
    directory: Path, config: ModelConfig, table: Sequence[Weight]
) -> tuple[dict[str, Adapter], dict[str, np.ndarray]]:
    """Reads an adapter that `write_peft`, or PEFT itself, wrote.

    Names may leave out the prefix of a multimodal wrapper, as adapters of the text model alone do.

    Returns:
        The plan, and stacked float32 factors by the paths of `adapter_shapes(plan)`.

    Raises:
        MissingFileError: no directory, or a file of it is absent.
        UserError: a variant of LoRA that is not alpha / r · B · A; unknown names, missing layers or
            experts, other shapes or dtypes (all listed).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such adapter directory")
    settings = read_settings(directory)
    file = directory / TENSORS
    if not file.is_file():
        raise MissingFileError(
            f"{file}: not found; kimi_jax reads adapters in one safetensors file"
        )
    entries = read_header(file)
    groups, problems = _match(entries, config, table, settings)
    if problems:
        raise UserError(
            listing(
                f"{directory}: {len(problems)} tensors do not fit the checkpoint or adapter_config.json",
                problems,
                "Nothing was loaded. An adapter must belong to this base and cover all layers and all "
                "experts of what it targets.",
            )
        )
    return _load(groups, entries, table)


def _match(
    entries: Mapping[str, Entry],
    config: ModelConfig,
    table: Sequence[Weight],
    settings: PeftSettings,
) -> tuple[dict[str, _Group], list[str]]:
    """What the file adapts, by name of the weight or of the fused parameter; and what does not fit."""
    catalogue: dict[str, list[_Module]] = {}
    for name, module in _catalogue(entries, config, table):
        catalogue.setdefault(name, []).append(module)
    groups: dict[str, _Group] = {}
    problems: list[str] = []
    known = set[str]()
    for name, modules in catalogue.items():
        tensors = [_tensor(module, factor) for module in modules for factor in FACTORS]
        if not any(tensor in entries for tensor in tensors):
            continue
        known.update(tensors)
        problems += [f"{tensor}: missing" for tensor in tensors if tensor not in entries]
        values = {_rank_and_alpha(module, name, settings) for module in modules}
        if len(values) > 1:
            shown = ", ".join(f"{rank} and {alpha:g}" for rank, alpha in sorted(values))
            problems.append(
                f"{name}: rank and alpha {shown}; required: one of each for all its modules"
            )
            continue
        groups[name] = _Group(modules, *values.pop())
        problems += _misfits(groups[name], entries)
    problems = [_unknown(name) for name in sorted(entries.keys() - known)] + problems
    twice = [name for name in (GATE, UP, DOWN) if name in groups and _fused_name(name) in groups]
    problems += [f"{name}: adapted expert by expert and fused" for name in twice]
    if not entries:
        problems.append(f"{TENSORS}: holds no tensor")
    return groups, problems


def _catalogue(
    entries: Mapping[str, Entry], config: ModelConfig, table: Sequence[Weight]
) -> Iterator[tuple[str, _Module]]:
    """Every module that an adapter of this model may have, in both layouts."""
    wrapped = any(name.startswith(PEFT_PREFIX + config.prefix) for name in entries)
    prefix = len(config.prefix) if not wrapped else 0
    lone_gate_up = _is_lone_gate_up(entries, config)
    for weight in table:
        if not weight.is_linear:
            continue
        routed = weight.role == "routed"
        out_size, in_size = weight.shape[-2:]
        for layer in range(weight.layers):
            for expert in range(config.n_routed_experts) if routed else [None]:
                name = module_name(weight, config, layer, expert)[prefix:]
                if peft_name(HEAD, "lora_A") in entries and name.endswith(f".{HEAD}"):
                    name = HEAD
                yield weight.name, _Module(name, weight, layer, expert, out_size, in_size)
            if weight.name in (GATE, DOWN):
                gate = weight.name == GATE
                name = experts_module(weight, config, layer)[prefix:]
                if gate and not lone_gate_up:
                    name += f".{INNER}"
                elif lone_gate_up and not gate:
                    continue
                size = 2 * out_size if gate else out_size
                yield (
                    _fused_name(weight.name),
                    _Module(name, weight, layer, None, size, in_size, config.n_routed_experts),
                )


def _is_lone_gate_up(entries: Mapping[str, Entry], config: ModelConfig) -> bool:
    """Whether only gate and up are adapted, fused. Then their name is down's; the sizes tell."""
    if any(f".experts.{INNER}.lora_" in name for name in entries):
        return False
    sizes = {
        factor: entry.shape[-1] if factor == "lora_A" else entry.shape[0]
        for name, entry in entries.items()
        for factor in FACTORS
        if name.endswith(f".mlp.experts.{factor}.weight") and len(entry.shape) == 2
    }
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return sizes in ({"lora_A": hidden}, {"lora_A": hidden, "lora_B": 2 * width})


def _fused_name(name: str) -> str:
    return f"{DOWN if name == DOWN else GATE_UP} (fused)"


def _tensor(module: _Module, factor: str) -> str:
    return peft_name(module.name, factor)


def _rank_and_alpha(module: _Module, group: str, settings: PeftSettings) -> tuple[int, float]:
    if module.folded == 1:
        return settings.of_module(module.name)
    parameter = group.split(".")[-1].removesuffix(" (fused)")
    return settings.of_key(f"{module.name.removesuffix(f'.{INNER}')}.{parameter}")


def _misfits(group: _Group, entries: Mapping[str, Entry]) -> list[str]:
    problems = []
    for module in group.modules:
        rank = group.rank * module.folded
        shapes = {"lora_A": (rank, module.in_size), "lora_B": (module.out_size, rank)}
        for factor, shape in shapes.items():
            name = _tensor(module, factor)
            entry = entries.get(name)
            if entry is None:
                continue
            if entry.shape != shape:
                problems.append(
                    f"{name}: found shape {list(entry.shape)}, required {list(shape)} (rank {group.rank})"
                )
            if entry.dtype not in _DTYPES:
                problems.append(
                    f"{name}: found dtype {entry.dtype}, required {' or '.join(_DTYPES)}"
                )
    return problems


def _unknown(name: str) -> str:
    if name.endswith(f".{INNER}.weight"):
        return (
            f"{name}: a weight of the base, which PEFT adds when embeddings or head are adapted; save "
            "the adapter with save_embedding_layers=False"
        )
    return f"{name}: adapts nothing that this checkpoint has"


def _load(
    groups: Mapping[str, _Group], entries: Mapping[str, Entry], table: Sequence[Weight]
) -> tuple[dict[str, Adapter], dict[str, np.ndarray]]:
    """Reads the tensors of matched groups into stacks."""
    plan: dict[str, Adapter] = {}
    arrays: dict[str, np.ndarray] = {}
    rows = {weight.path: weight for weight in table}
    for name, group in groups.items():
        if name == _fused_name(GATE):
            plan_part, array_part = _load_gate_up(group, entries, rows)
            plan |= plan_part
            arrays |= array_part
            continue
        part = {m.weight.path: Adapter(m.weight, group.rank, group.alpha) for m in group.modules}
        plan |= part
        arrays |= {
            path: np.empty(shape, np.float32) for path, shape in adapter_shapes(part).items()
        }
        for module in group.modules:
            place: tuple[int, ...] = (module.layer,) if module.weight.stack else ()
            if module.expert is not None:
                place += (module.expert,)
            for factor, value in zip(FACTORS, _read(module, entries), strict=True):
                arrays[f"{module.weight.path}.{factor}"][place] = value
    order = [path for path in rows if path in plan]
    return {path: plan[path] for path in order}, arrays


def _load_gate_up(
    group: _Group, entries: Mapping[str, Entry], rows: Mapping[str, Weight]
) -> tuple[dict[str, Adapter], dict[str, np.ndarray]]:
    """The fused parameter of gate and up as one adapter each."""
    layers = [_read(module, entries) for module in group.modules]
    halve = all(is_block_diagonal(factors.b) for factors in layers)
    parts = 2 if halve else 1
    gate_path = group.modules[0].weight.path
    plan, arrays = {}, {}
    for number, path in enumerate([gate_path, gate_path.replace(GATE, UP)]):
        plan[path] = Adapter(rows[path], group.rank // parts, group.alpha / parts)
        split = [split_gate_up(factors, halve)[number] for factors in layers]
        arrays[f"{path}.lora_A"] = np.stack([factors.a for factors in split])
        arrays[f"{path}.lora_B"] = np.stack([factors.b for factors in split])
    return plan, arrays


def _read(module: _Module, entries: Mapping[str, Entry]) -> Factors:
    a, b = (entries[_tensor(module, factor)].read().astype(np.float32) for factor in FACTORS)
    return Factors(a, b) if module.folded == 1 else unfold(a, b, module.folded)
