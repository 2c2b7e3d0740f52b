"""Bytes of a step on one device beyond what lives from step to step, from the shapes of the algorithm.

`saved` stands between forward and backward pass; `phases` are the moments at which most else is live,
each a list of terms that stand at the same time. The largest phase is the step's workspace. Checked
against the compiler's reports: see LOG.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kimi_jax.config import Keep, Recompute
from kimi_jax.model.config import ModelConfig
from kimi_jax.parallel.ranks import Ranks

FP32 = INT32 = 4
Terms = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """One micro-batch on one device.

    rows, length: sequences of this device and their tokens. itemsize: bytes of an activation. keep:
    what is kept beside layers' inputs; offload: the same, in the host's memory. low_rank: columns of all
    adapters' products but experts', and expert_low_rank: of theirs. chunk: tokens of a device whose logits
    exist at one time. adapters: bytes of this device's fp32 adapters. layer_weights: bytes of the matrices,
    but the experts', of a layer with experts, whole. matrices: those of all layers.
    """

    config: ModelConfig
    ranks: Ranks
    rows: int
    length: int
    itemsize: int
    recompute: Recompute
    keep: tuple[Keep, ...]
    offload: tuple[Keep, ...]
    low_rank: int
    expert_low_rank: int
    chunk: int
    adapters: int
    layer_weights: int
    matrices: int

    @property
    def gathers_weights(self) -> bool:
        """Whether layers' matrices are stored in parts and gathered at each use."""
        return self.ranks.expert > 1 and self.ranks.rest == "sharded"

    @property
    def tokens(self) -> int:
        """Of this device."""
        return self.rows * self.length

    @property
    def gathered(self) -> int:
        """Tokens that this device's experts see: those of all expert ranks."""
        return self.tokens * self.ranks.expert

    @property
    def assignments(self) -> int:
        """Of all tokens that this device's experts see."""
        return self.gathered * self.config.num_experts_per_tok

    @property
    def buffer(self) -> int:
        """Rows of the expert buffer: assignments that one pass computes."""
        return self.ranks.buffer_rows(self.assignments)

    def hidden(self, tokens: int) -> int:
        """Bytes of hidden states of so many tokens."""
        return tokens * self.config.hidden_size * self.itemsize


def saved(work: Work) -> dict[str, int]:
    """What the forward pass leaves for the backward pass."""
    config = work.config
    terms = {
        # The scan over layers keeps each layer's input.
        "layer inputs": config.num_hidden_layers * work.hidden(work.tokens),
        # Choosing again in another fusion could choose otherwise.
        "router's choice": config.num_moe_layers
        * work.tokens
        * config.num_experts_per_tok
        * (INT32 + FP32),
        # Of the assignments of all ranks' rows: by expert, and back.
        "assignments' order": 2 * config.num_moe_layers * work.assignments * INT32,
        # Two of the hidden states, and those of the latents that there are.
        "norms' statistics": config.num_hidden_layers
        * (4 if config.q_lora_rank else 3)
        * work.tokens
        * FP32,
        "adapters' low-rank products": work.tokens * work.low_rank * work.itemsize,
        "experts' low-rank products": work.buffer * work.expert_low_rank * work.itemsize,
    }
    terms |= {f"kept: {name}": kept_bytes(work, name) for name in work.keep}
    if work.recompute == "none":
        layers = config.num_hidden_layers
        terms["attention's operands"] = layers * sum(_attention(work).values())
        # Norms' results and inputs of adapters, beside the operands above.
        terms["hidden states"] = layers * 6 * work.hidden(work.tokens)
        terms["dense layers' operands"] = (
            config.first_k_dense_replace
            * 3
            * work.tokens
            * config.intermediate_size
            * work.itemsize
        )
        # A gathered matrix is an operand of its product's derivative, so it stays, too.
        if work.gathers_weights:
            terms["gathered weights"] = work.matrices
        terms["experts' operands"] = config.num_moe_layers * sum(_experts_kept(work).values())
    return terms


def offloaded(work: Work) -> dict[str, int]:
    """What the forward pass leaves in the host's memory for the backward pass."""
    return {name: kept_bytes(work, name) for name in work.offload}


def _on_their_way(work: Work) -> int:
    """What comes back from the host's memory: a layer's that is used, and the next one's."""
    return 2 * sum(offloaded(work).values()) // work.config.num_hidden_layers


def kept_bytes(work: Work, name: Keep) -> int:
    """Of all layers, what a name of `train.keep` stands for."""
    config = work.config
    layers, with_experts = config.num_hidden_layers, config.num_moe_layers
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim
    heads = layers * work.tokens * config.num_attention_heads
    attention = config.v_head_dim * work.itemsize + FP32
    keys_values = (config.qk_nope_head_dim + config.v_head_dim) * work.itemsize
    dense = config.first_k_dense_replace * config.intermediate_size
    shared = with_experts * config.n_shared_experts * config.moe_intermediate_size
    one_projection = with_experts * work.buffer * config.moe_intermediate_size * work.itemsize
    sizes: dict[Keep, int] = {
        "stream": layers * work.hidden(work.tokens),
        "latents": layers * work.tokens * latents * work.itemsize,
        "queries": heads * config.qk_head_dim * work.itemsize,
        "keys_values": heads * keys_values,
        "attention": heads * attention,
        "feed_forward": 2 * work.tokens * (dense + shared) * work.itemsize,
        "expert_gate": one_projection,
        "expert_up": one_projection,
    }
    return sizes[name]


def phases(work: Work) -> dict[str, dict[str, int]]:
    """Live terms by phase; one phase's terms stand together."""
    found = {"loss": _loss(work), "update": _update(work)}
    if work.config.num_moe_layers:
        found["experts, backward"] = _experts_backward(work)
    if work.config.first_k_dense_replace:
        found["dense layer, backward"] = _dense_backward(work)
    found["attention, backward"] = _attention_backward(work)
    return found


def workspace(work: Work) -> tuple[str, int]:
    """The largest phase, and its bytes."""
    totals = {name: sum(terms.values()) for name, terms in phases(work).items()}
    name = max(totals, key=lambda phase: totals[phase])
    return name, totals[name]


def _experts_kept(work: Work) -> dict[str, int]:
    """Without recomputation. Passes over a buffer keep this of the first, and repeat the others."""
    config = work.config
    width = config.moe_intermediate_size * work.itemsize
    return {
        "gathered rows": work.hidden(work.gathered),
        "expert buffer": work.hidden(work.buffer),
        "gate, up, weighted": 3 * work.buffer * width,
    }


def _experts_backward(work: Work) -> dict[str, int]:
    config = work.config
    width = config.moe_intermediate_size * work.itemsize
    return {
        # Residual of the passes, made again by gathering the layer's normed input.
        "gathered rows": work.hidden(work.gathered),
        # The cotangent of the experts' sum, gathered from all ranks.
        "gathered cotangents": work.hidden(work.gathered),
        "rows' cotangents": work.hidden(work.gathered),
        # Rows in the order of experts, and gate's and up's cotangents of them.
        "expert buffer": work.hidden(work.buffer),
        "buffer's cotangents": 2 * work.hidden(work.buffer),
        # gate, up and the weighted product, each with its cotangent.
        "hidden activations": 6 * work.buffer * width,
        # The layer's attention, made again before its experts and not yet gone back through: its
        # operands in the model's order of dimensions and in its kernel's.
        "attention's operands": 2 * sum(_attention(work).values()),
        # The residual stream and its cotangent, norms of it, what attention and the shared experts add.
        "hidden states": 10 * work.hidden(work.tokens),
        "gathered weights": _gathered_weights(work),
        "from the host's memory": _on_their_way(work),
    }


def _gathered_weights(work: Work) -> int:
    """Matrices of a layer, gathered from their parts; the next layer's are on their way already."""
    return 2 * work.layer_weights if work.gathers_weights else 0


def _attention(work: Work) -> dict[str, int]:
    config = work.config
    heads = config.num_attention_heads * work.tokens * work.itemsize
    return {
        "queries": heads * config.qk_head_dim,
        "keys without their shared part, values": heads
        * (config.qk_nope_head_dim + config.v_head_dim),
        "output": heads * config.v_head_dim,
    }


def _attention_backward(work: Work) -> dict[str, int]:
    terms = _attention(work)
    twice = {f"{name}, and cotangents": 2 * size for name, size in terms.items()}
    return twice | {
        "layer's input and cotangent": 3 * work.hidden(work.tokens),
        "from the host's memory": _on_their_way(work),
    }


def _dense_backward(work: Work) -> dict[str, int]:
    config = work.config
    width = work.tokens * config.intermediate_size * work.itemsize
    return {"gate, up, product, and cotangents": 6 * width}


def _loss(work: Work) -> dict[str, int]:
    config = work.config
    tokens = min(work.chunk, work.tokens) * work.ranks.expert
    vocabulary = -(-config.vocab_size // work.ranks.expert)
    return {
        "final hidden states and cotangents": 2 * work.hidden(work.tokens),
        "a chunk's hidden states": 2 * work.hidden(tokens),
        # fp32 logits and their cotangent, before and after the cast.
        "logits": tokens * vocabulary * (2 * FP32 + work.itemsize),
    }


def _update(work: Work) -> dict[str, int]:
    return {"updates": work.adapters}
