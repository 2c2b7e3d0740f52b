"""What is trained: adapter targets, their factors, and their initial values.

An adapter adds alpha / rank · B · A to a linear weight [out, in], with A [rank, in] and B [out, rank]
as in PEFT (arXiv:2106.09685). Routed experts have one pair each, or share, within a layer, the
factor on the hidden side: A of gate and up, B of down.
"""

import difflib
import fnmatch
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.config import ExpertFactors, LoraSection
from kimi_jax.errors import UserError, listing
from kimi_jax.model.params import LINEAR_ROLES, Weight

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Adapter:
    """The adapter of one row of the weight table (of every layer of its stack)."""

    weight: Weight
    rank: int
    alpha: float
    factors: ExpertFactors = "per_expert"

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `lora_A` and `lora_B` with the layer dimension in front, if there is one."""
        *experts, out_size, in_size = self.weight.shape
        shared_a = shared_b = False
        if self.weight.role == "routed" and self.factors == "shared":
            shared_b = self.weight.name.endswith("down_proj")
            shared_a = not shared_b
        lead = (self.weight.layers,) if self.weight.stack else ()
        return {
            "lora_A": (*lead, *([] if shared_a else experts), self.rank, in_size),
            "lora_B": (*lead, *([] if shared_b else experts), out_size, self.rank),
        }

    @property
    def parameters(self) -> int:
        """Trained values of all layers together."""
        total = 0
        for shape in self.shapes().values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total


AdapterPlan = Mapping[str, Adapter]  # by the path of the adapted weight


def plan_adapters(settings: LoraSection, table: Sequence[Weight]) -> dict[str, Adapter]:
    """Resolves `lora.targets` against the weight table.

    A target is a role (`attention`, `dense`, `shared`, `routed`, `head`), a linear layer's name
    (`q_a_proj`, `self_attn.q_a_proj`, `mlp.experts.down_proj`) or a pattern with `*`, `?`, `[…]` on
    the name. A name ending such as `gate_proj` takes every layer of that name: dense, shared, routed.

    Raises:
        UserError: a target that matches nothing, or only frozen weights (all of them listed).
    """
    chosen: dict[str, Adapter] = {}
    problems = []
    for target in settings.targets:
        matches = [weight for weight in table if _matches(target, weight)]
        linear = [weight for weight in matches if weight.is_linear]
        if not linear:
            problems.append(_explain(target, matches, table))
        for weight in linear:
            routed = weight.role == "routed"
            chosen[weight.path] = Adapter(
                weight,
                settings.routed_rank if routed else settings.rank,
                settings.routed_alpha if routed else settings.alpha,
                settings.expert_factors if routed else "per_expert",
            )
    if problems:
        raise UserError(listing("lora.targets: nothing to adapt", problems))
    return {weight.path: chosen[weight.path] for weight in table if weight.path in chosen}


def adapter_shapes(plan: AdapterPlan) -> dict[str, tuple[int, ...]]:
    """Shapes of every factor by its path, `moe_layers.self_attn.q_a_proj.lora_A`."""
    return {
        f"{path}.{factor}": shape
        for path, adapter in plan.items()
        for factor, shape in adapter.shapes().items()
    }


def init_adapters(
    plan: AdapterPlan,
    seed: int,
    place: Callable[[str, np.ndarray], jax.Array] = lambda _, values: jnp.asarray(values),
) -> dict[str, jax.Array]:
    """Initial factors, fp32: A uniform in ±1/√in as PEFT's, B zero, so that the model starts as its base.

    Each layer's factor has a generator of its own, keyed by seed, path and layer: another target more
    or less changes no other's draw. They are drawn on the host, where it costs no compilation, and
    go through `place`, with their path, to the devices.
    """
    factors = {}
    for path, shape in adapter_shapes(plan).items():
        values = np.zeros(shape, np.float32)
        if path.endswith("lora_A"):
            in_stack = "_layers." in path
            for layer in range(shape[0]) if in_stack else [...]:
                key = [seed, zlib.crc32(path.encode()), layer if in_stack else 0]
                uniform = np.random.default_rng(key).random(values[layer].shape, np.float32)
                values[layer] = (2 * uniform - 1) * np.float32(shape[-1] ** -0.5)
        factors[path] = place(path, values)
    return factors


def _matches(target: str, weight: Weight) -> bool:
    if target == weight.role:
        return True
    names = (weight.name, weight.name.rsplit(".", 1)[-1])
    return any(fnmatch.fnmatchcase(name, target) for name in names)


def _explain(target: str, matches: Sequence[Weight], table: Sequence[Weight]) -> str:
    if matches:
        frozen = ", ".join(sorted({weight.name for weight in matches}))
        return f"{target!r} matches only {frozen}: routers, norms and the embedding stay frozen"
    known = sorted(
        {weight.name for weight in table if weight.is_linear}
        | {weight.name.rsplit(".", 1)[-1] for weight in table if weight.is_linear}
        | {role for role in LINEAR_ROLES if any(w.role == role for w in table)}
    )
    close = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"{target!r} matches no weight of this checkpoint; {hint}"
