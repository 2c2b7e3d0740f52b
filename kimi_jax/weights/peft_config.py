"""`adapter_config.json`: written for a plan, and read back into ranks and alphas of modules.

PEFT picks an adapter's targets by the last parts of a module's name, and its rank and alpha by the
first pattern of `rank_pattern` and `alpha_pattern` that the name ends in, else `r` and `lora_alpha`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kimi_jax.errors import MissingFileError, UserError, listing
from kimi_jax.lora import Adapter, AdapterPlan
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import weight_table
from kimi_jax.weights.peft_layout import DOWN, EXPERTS, GATE, GATE_UP, UP

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
Layout = Literal["peft", "peft-fused"]

# Fields of LoraConfig whose other values mean another computation than alpha / r · B · A.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The others (pissa, olora, corda, loftq, …) also change the base, which is not in the adapter.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class PeftSettings:
    """What an `adapter_config.json` says about ranks and alphas."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]

    def of_module(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a linear module, `model.layers.0.mlp.gate_proj`."""
        weight = f"{module}.weight"
        by_weight = any(f".{weight}".endswith(f".{p}") for p in self.target_parameters)
        return self.of_key(weight if by_weight else module)

    def of_key(self, key: str) -> tuple[int, float]:
        """Rank and alpha of a module or parameter by the name that PEFT matches patterns with."""
        rank = next((v for p, v in self.rank_pattern.items() if _ends_in(p, key)), self.rank)
        alpha = next((v for p, v in self.alpha_pattern.items() if _ends_in(p, key)), self.alpha)
        return rank, alpha


def adapter_config(
    plan: AdapterPlan, config: ModelConfig, base_name: str | None, layout: Layout
) -> dict[str, Any]:
    """The contents of `adapter_config.json` for a plan (LoraConfig of PEFT, plain alpha / r)."""
    adapters = list({adapter.weight.name: adapter for adapter in plan.values()}.values())
    # What is not a routed expert decides `r` and `lora_alpha`; engines that know no patterns read these.
    usual = min(adapters, key=lambda adapter: adapter.weight.role == "routed")
    if layout == "peft":
        modules, parameters = _target_modules(plan, config), []
        patterns = _module_patterns(adapters, usual)
    else:
        modules = sorted(a.weight.name.split(".")[-1] for a in adapters if not _in_mlp(a))
        parameters, patterns = _fused_targets(adapters, usual)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": usual.rank,
        "lora_alpha": _plain(usual.alpha),
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": {key: rank for key, (rank, _) in patterns.items()},
        "alpha_pattern": {key: _plain(alpha) for key, (_, alpha) in patterns.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_bias": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "auto_mapping": None,
    }


def read_settings(directory: Path) -> PeftSettings:
    """Reads `adapter_config.json`.

    Raises:
        MissingFileError: no directory, or no such file in it.
        UserError: not JSON, no LoRA, or a variant of it that computes something else (all listed).
    """
    path = directory / CONFIG
    if not path.is_file():
        raise MissingFileError(f"{path}: not found; a PEFT adapter directory has an {CONFIG}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found a {type(raw).__name__}, required a JSON object")
    problems = [
        f"{key} is {raw[key]!r}; required: {accepted[0]!r}"
        for key, accepted in _REQUIRED.items()
        if key in raw and not any(raw[key] is v or raw[key] == v for v in accepted)
    ]
    if "peft_type" not in raw:
        problems.append("peft_type is missing; required: 'LORA'")
    ranks = {"r": raw.get("r"), **_labelled(raw, "rank_pattern", problems)}
    alphas = {"lora_alpha": raw.get("lora_alpha"), **_labelled(raw, "alpha_pattern", problems)}
    for key, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{key} is {value!r}; required: an integer of at least 1")
    for key, value in alphas.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            problems.append(f"{key} is {value!r}; required: a number above 0")
    if problems:
        raise UserError(listing(f"{path}: not an adapter that kimi_jax computes", problems))
    return PeftSettings(
        raw["r"],
        float(raw["lora_alpha"]),
        raw.get("rank_pattern") or {},
        {key: float(alpha) for key, alpha in (raw.get("alpha_pattern") or {}).items()},
        tuple(raw.get("target_parameters") or ()),
    )


def _labelled(raw: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, Any]:
    """The entries of a pattern object, each named as a message names it."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        problems.append(f"{key} is {patterns!r}; required: an object of pattern and number")
        return {}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{key}: {pattern!r} is not a regular expression: {error}")
    return {f"{key}[{pattern!r}]": value for pattern, value in patterns.items()}


def _ends_in(pattern: str, key: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", key) is not None


def _target_modules(plan: AdapterPlan, config: ModelConfig) -> list[str]:
    """Names that select the plan's modules and no others.

    The bare name (`gate_proj`), which engines read best, where all layers of that name are adapted;
    else one that tells dense, shared and routed apart.
    """
    adapted = {adapter.weight.name for adapter in plan.values()}
    everything = {weight.name for weight in weight_table(config) if weight.is_linear}
    targets = set[str]()
    for name in adapted:
        last = name.split(".")[-1]
        if {other for other in everything if other.split(".")[-1] == last} <= adapted:
            targets.add(last)
        elif name.startswith(f"{EXPERTS}."):
            targets |= {f"experts.{expert}.{last}" for expert in range(config.n_routed_experts)}
        else:
            targets.add(".".join(name.split(".")[-2:]))  # mlp.gate_proj, shared_experts.gate_proj
    return sorted(targets)


def _module_patterns(adapters: Sequence[Adapter], usual: Adapter) -> dict[str, tuple[int, float]]:
    """Pattern to rank and alpha for what differs from the usual, experts as one module each."""
    patterns = {
        _escaped(".".join(a.weight.name.split(".")[-2:])): (a.rank, a.alpha)
        for a in adapters
        if a.weight.role != "routed" and _differs(a, usual)
    }
    routed = {a.weight.name: a for a in adapters if a.weight.role == "routed"}
    unusual = {name: a for name, a in routed.items() if _differs(a, usual)}
    if unusual:
        # Read only where transformers fuses the experts: what PEFT would assume there follows `r`.
        patterns |= _fused_patterns([a for a in routed.values() if _is_whole(a, routed)])
    alike: dict[tuple[int, float], list[str]] = {}
    for name, adapter in unusual.items():
        alike.setdefault((adapter.rank, adapter.alpha), []).append(name)
    for value, names in alike.items():
        lasts = [name.split(".")[-1].removesuffix("_proj") for name in names]
        patterns[rf"experts\.\d+\.({'|'.join(lasts)})_proj"] = value
    return patterns


def _is_whole(adapter: Adapter, routed: Mapping[str, Adapter]) -> bool:
    """Whether the fused parameter of this projection is adapted in all of its parts."""
    return adapter.weight.name == DOWN or {GATE, UP} <= routed.keys()


def _fused_targets(
    adapters: Sequence[Adapter], usual: Adapter
) -> tuple[list[str], dict[str, tuple[int, float]]]:
    """`target_parameters` of `peft-fused`, and its patterns.

    Dense and shared layers are listed by their weight: as modules named gate_proj, up_proj or
    down_proj PEFT would take them for experts and drop their factors.
    """
    parameters = []
    patterns = _fused_patterns([a for a in adapters if a.weight.role == "routed"])
    for adapter in adapters:
        name = adapter.weight.name
        if adapter.weight.role == "routed":
            parameters.append(DOWN if name == DOWN else GATE_UP)
        elif _in_mlp(adapter):
            parameters.append(f"{name}.weight")
        if adapter.weight.role != "routed" and _differs(adapter, usual):
            key = f"{name}.weight" if _in_mlp(adapter) else ".".join(name.split(".")[-2:])
            patterns[_escaped(key)] = (adapter.rank, adapter.alpha)
    return sorted(set(parameters)), patterns


def _fused_patterns(routed: Iterable[Adapter]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of the fused expert parameters; gate and up together have twice of each."""
    patterns = {}
    for adapter in routed:
        if adapter.weight.name == DOWN:
            patterns[_escaped(DOWN)] = (adapter.rank, adapter.alpha)
        else:
            patterns[_escaped(GATE_UP)] = (2 * adapter.rank, 2 * adapter.alpha)
    return patterns


def _in_mlp(adapter: Adapter) -> bool:
    return adapter.weight.role in ("dense", "shared", "routed")


def _differs(adapter: Adapter, usual: Adapter) -> bool:
    return (adapter.rank, adapter.alpha) != (usual.rank, usual.alpha)


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _plain(alpha: float) -> int | float:
    """An integer where it is one: LoraConfig declares lora_alpha as int."""
    return int(alpha) if float(alpha).is_integer() else alpha
