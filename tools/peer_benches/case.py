"""What is measured: the layer's sizes, the tokens, and the arithmetic they need. Imports no framework."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SCALE = 2.0  # alpha / rank of the run that `ours` reads; a factor, without influence on time


@dataclass(frozen=True)
class Sizes:
    """Of a layer; fields as in the checkpoint's `config.json`."""

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    rms_norm_eps: float

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """The sizes in the contents of a `config.json`."""
    return Sizes(**{name: config[name] for name in Sizes.__dataclass_fields__})


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        peer: whose, a key of `bench_peers.PEERS`.
        config: path of the directory with the architecture's `config.json`.
        batch: sequences of this GPU.
        length: tokens of each.
        rank: of every adapter.
        ranks: GPUs that share the experts; this is one of them, alone.
        calls: timed, after the warm-up.
        loads: assignments by expert of this GPU's own tokens; None: as the peer's router has it.
        moe_layers: of transformers' model.
        attention: that transformers is to use; None: the fastest.
        compiled: whether transformers' model goes through torch.compile.
        recipe: path of the YAML file of ours.
        overrides: of the recipe, `section.field=value`.
    """

    peer: str
    config: str
    batch: int = 4
    length: int = 2048
    rank: int = 8
    ranks: int = 1
    calls: int = 7
    loads: tuple[int, ...] | None = None
    moe_layers: int = 1
    attention: str | None = None
    compiled: bool = False
    recipe: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of this GPU."""
        return self.batch * self.length

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Case":
        """The inverse of `to_json`."""
        loads, overrides = fields["loads"], tuple(fields["overrides"])
        loads = None if loads is None else tuple(loads)
        return Case(**{**fields, "loads": loads, "overrides": overrides})


def expert_parameters(sizes: Sizes) -> int:
    """Of one routed expert."""
    return 3 * sizes.hidden_size * sizes.moe_intermediate_size


def token_parameters(sizes: Sizes) -> int:
    """Parameters of a mixture-of-experts layer that every token is multiplied by: all but routed experts."""
    heads, hidden = sizes.num_attention_heads, sizes.hidden_size
    attention = (
        hidden * sizes.q_lora_rank
        + sizes.q_lora_rank * heads * sizes.qk_head_dim
        + hidden * (sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        + sizes.kv_lora_rank * heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        + heads * sizes.v_head_dim * hidden
    )
    shared = sizes.n_shared_experts * expert_parameters(sizes)
    return attention + shared + sizes.n_routed_experts * hidden


def useful_operations(sizes: Sizes, tokens: int, assignments: int) -> int:
    """Of a layer's forward pass and input gradients: four a parameter.

    No recomputation, no gradient of a frozen weight, no attention scores, no adapters.

    Args:
        sizes: of the layer.
        tokens: that pass attention, router and shared experts.
        assignments: rows of the routed experts.
    """
    return 4 * (tokens * token_parameters(sizes) + assignments * expert_parameters(sizes))


def local_experts(sizes: Sizes, ranks: int) -> int:
    """Experts of one GPU."""
    return sizes.n_routed_experts // ranks


def assignments_here(loads: tuple[int, ...], ranks: int) -> int:
    """Rows of this GPU's experts: its share of what all ranks' tokens chose, all like its own tokens."""
    return ranks * sum(loads[: len(loads) // ranks])
