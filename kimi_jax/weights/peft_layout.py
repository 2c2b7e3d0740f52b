"""Adapter factors under PEFT's names, in its two layouts of routed experts.

Here a layer's experts are stacked: A [E, r, in], B [E, out, r]. PEFT has them as one module each
(`peft`), or, in transformers 5, as an adapter of one parameter with an expert dimension
(`peft-fused`, LoraConfig.target_parameters): gate_up_proj [E, 2I, H] and down_proj [E, I, H]. Folded
into two matrices, A is expert-major, [E·r, in], and B expert-minor, [out, r·E].
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from kimi_jax.errors import UserError, listing
from kimi_jax.lora import FACTORS, Adapter, AdapterPlan
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight
from kimi_jax.weights.names import module_name, peft_name

EXPERTS = "mlp.experts"
GATE, UP, DOWN = (f"{EXPERTS}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
GATE_UP = f"{EXPERTS}.gate_up_proj"
# PEFT wraps a module once more for its second adapted parameter; this names the inner wrapper.
INNER = "base_layer"
# transformers takes the head out of a multimodal wrapper's prefix, and PEFT does not follow it.
HEAD = "lm_head"


class Factors(NamedTuple):
    """The adapters of one projection of a layer's experts."""

    a: Float[np.ndarray, "E r in"]
    b: Float[np.ndarray, "E out r"]


def per_expert_tensors(
    plan: AdapterPlan,
    config: ModelConfig,
    arrays: Mapping[str, Array | np.ndarray],
    repeat_shared: bool = True,
) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT names with one module per expert, and float32 views [r, in] or [out, r]."""
    for path, adapter in plan.items():
        weight = adapter.weight
        for factor in FACTORS:
            stacked, has_experts = stacked_factor(adapter, path, factor, arrays)
            each = weight.role == "routed" and (has_experts or repeat_shared)
            for layer in range(weight.layers):
                for expert in range(config.n_routed_experts) if each else [None]:
                    name = peft_name(module_name(weight, config, layer, expert), factor)
                    yield name, stacked[layer, expert] if has_experts else stacked[layer]


def stacked_factor(
    adapter: Adapter, path: str, factor: str, arrays: Mapping[str, Array | np.ndarray]
) -> tuple[np.ndarray, bool]:
    """A factor as float32 on the host with a layer dimension, and whether experts have one each."""
    stacked = np.asarray(arrays[f"{path}.{factor}"], np.float32)
    assert stacked.shape == adapter.shapes()[factor], path
    if not adapter.weight.stack:
        stacked = stacked[None]
    return stacked, stacked.ndim == 4


def fused_tensors(
    plan: AdapterPlan, config: ModelConfig, arrays: Mapping[str, Array | np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT names with the experts of a layer in one parameter; all other weights as in `peft`.

    Raises:
        UserError: targets that the fused parameters cannot express.
    """
    check_fusible(plan)
    others = {path: adapter for path, adapter in plan.items() if adapter.weight.role != "routed"}
    for name, value in per_expert_tensors(others, config, arrays):
        yield name.replace(f"{config.prefix}{HEAD}.", f"{HEAD}."), value
    routed = {a.weight.name: (path, a) for path, a in plan.items() if a.weight.role == "routed"}
    if not routed:
        return

    def factors(name: str, layer: int) -> Factors:
        path, adapter = routed[name]
        a, b = (stacked_factor(adapter, path, factor, arrays)[0][layer] for factor in FACTORS)
        experts = (config.n_routed_experts,)
        return Factors(  # a shared factor is the same matrix for every expert
            np.broadcast_to(a, experts + a.shape[-2:]), np.broadcast_to(b, experts + b.shape[-2:])
        )

    any_weight = next(iter(routed.values()))[1].weight
    for layer in range(any_weight.layers):
        fused = []
        if GATE in routed:
            gate_up = join_gate_up(factors(GATE, layer), factors(UP, layer))
            fused.append((f".{INNER}" if DOWN in routed else "", gate_up))
        if DOWN in routed:
            fused.append(("", factors(DOWN, layer)))
        for inner, (a, b) in fused:
            module = experts_module(any_weight, config, layer) + inner
            yield peft_name(module, "lora_A"), fold_a(a)
            yield peft_name(module, "lora_B"), fold_b(b)


def check_fusible(plan: AdapterPlan) -> None:
    """Refuses what an adapter of transformers' fused expert parameters cannot say."""
    routed = {a.weight.name: a for a in plan.values() if a.weight.role == "routed"}
    problems = []
    gate, up = routed.get(GATE), routed.get(UP)
    if (gate is None) != (up is None):
        have, lack = (GATE, UP) if up is None else (UP, GATE)
        problems.append(f"{have} is adapted and {lack} is not, but there they are one parameter")
    if gate and up and (gate.rank, gate.alpha) != (up.rank, up.alpha):
        problems.append(
            f"{GATE} has rank {gate.rank}, alpha {gate.alpha:g}, {UP} rank {up.rank}, alpha {up.alpha:g}; "
            "one parameter has one of each"
        )
    if problems:
        raise UserError(
            listing(
                "peft-fused: transformers' fused experts cannot express this adapter",
                problems,
                "Export as peft (one module per expert) or merged, or train both projections alike.",
            )
        )


def experts_module(weight: Weight, config: ModelConfig, layer: int) -> str:
    """HF's module of a layer's experts, `model.layers.7.mlp.experts`, from any routed weight."""
    return module_name(weight, config, layer, None).rsplit(".", 1)[0]


def join_gate_up(gate: Factors, up: Factors) -> Factors:
    """One adapter of rank 2r for gate and up rows side by side: A stacked, B block diagonal.

    With alpha doubled too, alpha / rank stays, and so does the change of each projection, exactly.
    """
    experts, width, rank = gate.b.shape
    b = np.zeros((experts, 2 * width, 2 * rank), np.float32)
    b[:, :width, :rank] = gate.b
    b[:, width:, rank:] = up.b
    return Factors(np.concatenate([gate.a, up.a], axis=1), b)


def is_block_diagonal(b: Float[np.ndarray, "*stack out r"]) -> bool:
    """Whether gate rows use only the first half of the rank and up rows only the second."""
    width, rank = b.shape[-2] // 2, b.shape[-1] // 2
    if b.shape[-1] % 2:
        return False
    return not (b[..., :width, rank:].any() or b[..., width:, :rank].any())


def split_gate_up(joined: Factors, halve: bool) -> tuple[Factors, Factors]:
    """Gate's and up's factors out of the joined ones; views.

    Args:
        joined: A [E, R, in], B [E, 2I, R].
        halve: the joined B is block diagonal, so each projection gets half the rank. If not, each
            keeps the whole A: exact too, with more parameters.
    """
    width, rank = joined.b.shape[-2] // 2, joined.a.shape[-2] // 2
    gate, up = joined.b[..., :width, :], joined.b[..., width:, :]
    if not halve:
        return Factors(joined.a, gate), Factors(joined.a, up)
    return (
        Factors(joined.a[..., :rank, :], gate[..., :rank]),
        Factors(joined.a[..., rank:, :], up[..., rank:]),
    )


def fold_a(a: Float[np.ndarray, "E r in"]) -> Float[np.ndarray, "Er in"]:
    """Expert-major: row e·r + k is row k of expert e."""
    return a.reshape(-1, a.shape[-1])


def fold_b(b: Float[np.ndarray, "E out r"]) -> Float[np.ndarray, "out rE"]:
    """Expert-minor: column k·E + e is column k of expert e."""
    return np.ascontiguousarray(b.transpose(1, 2, 0).reshape(b.shape[1], -1))


def unfold(folded_a: np.ndarray, folded_b: np.ndarray, experts: int) -> Factors:
    """The inverse of `fold_a` and `fold_b`."""
    a = folded_a.reshape(experts, -1, folded_a.shape[-1])
    b = folded_b.reshape(folded_b.shape[0], -1, experts).transpose(2, 0, 1)
    return Factors(a, b)
