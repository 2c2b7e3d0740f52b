"""The least time of each part of a step: operations over a measured product's rate, or bytes over a copy's.

From the shapes of the model and the rows, whatever the program does. What is recomputed is work that a
larger memory would spare; its floor is that of computing it again once.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight
from tools.step_bench import parts
from tools.step_bench.parts import BACKWARD, FORWARD, ONCE, RECOMPUTED

FP32 = 4


class Rates(NamedTuple):
    """Operations a second of a product and of attention, bytes a second of a copy (read + written)."""

    matmul: float
    copy: float
    attention_forward: float
    attention_both: float


@dataclass(frozen=True)
class Work:
    """One rank's micro-batch.

    ranks: that share the experts. tokens: of this rank, padding included. squares: sum of the squared
    lengths of its documents. received: assignments to its experts, all layers together. itemsize: bytes
    of an activation. expert_rank: of the experts' adapters, 0 without. trained: its adapters' values.
    """

    model: ModelConfig
    table: Sequence[Weight]
    ranks: int
    tokens: int
    squares: int
    received: float
    itemsize: int
    expert_rank: int
    trained: int

    def parameters(self, *roles: str) -> int:
        """Of all layers, whole."""
        return sum(weight.parameters for weight in self.table if weight.role in roles)


class Floor(NamedTuple):
    """Seconds, and from what."""

    seconds: float
    why: str


Floors = dict[tuple[str, str], Floor]


def floors(work: Work, rates: Rates) -> Floors:
    """By part and phase; parts that need not be there, as copies for what ranks exchange, have none."""
    found: Floors = {}

    def products(part: str, phase: str, operations: float) -> None:
        found[part, phase] = Floor(operations / rates.matmul, f"{operations / 1e12:.1f} TFLOP")

    def moved(part: str, phase: str, values: float, itemsize: int) -> None:
        size = values * itemsize
        found[part, phase] = Floor(size / rates.copy, f"{size / 1e9:.1f} GB")

    _attention(work, rates, found)
    for phase in (FORWARD, RECOMPUTED, BACKWARD):
        products(parts.PROJECTIONS, phase, 2 * work.tokens * work.parameters("attention"))
        products(parts.DENSE, phase, 2 * work.tokens * work.parameters("dense", "shared"))
        for part, values in _elementwise(work, phase).items():
            moved(part, phase, values, work.itemsize)
    routers = sum(w.parameters for w in work.table if w.name == "mlp.gate.weight")
    for phase in (FORWARD, BACKWARD):
        products(parts.ROUTER, phase, 2 * work.tokens * routers)
    for phase, operations in _experts(work).items():
        products(parts.EXPERTS, phase, operations)
    for phase, values in _movement(work).items():
        moved(parts.MOVEMENT, phase, values, work.itemsize)
    # Each rank meets all ranks' tokens with its part of the vocabulary: as much as its own with all. The
    # gradient is made beside the loss.
    products(parts.HEAD, FORWARD, 4 * work.tokens * work.parameters("head"))
    if work.expert_rank:
        _expert_adapters(work, rates, found)
    # Factor, gradient and both moments are read, all but the gradient written.
    moved(parts.OPTIMIZER, ONCE, 7 * work.trained, FP32)
    return found


def total(found: Floors, repeated: Container[tuple[str, str]] = ()) -> float:
    """Seconds of all parts but those that are recomputed, and of those if they are in `repeated`."""
    return sum(f.seconds for key, f in found.items() if key[1] != RECOMPUTED or key in repeated)


def _attention(work: Work, rates: Rates, found: Floors) -> None:
    model = work.model
    heads = model.num_hidden_layers * model.num_attention_heads
    # Two products a pair of positions, of which a causal mask leaves half.
    forward = heads * (model.qk_head_dim + model.v_head_dim) * work.squares
    once = forward / rates.attention_forward
    back = 3.5 * forward / rates.attention_both - once
    found[parts.ATTENTION, FORWARD] = Floor(once, f"{forward / 1e12:.1f} TFLOP")
    found[parts.ATTENTION, RECOMPUTED] = Floor(once, f"{forward / 1e12:.1f} TFLOP")
    found[parts.ATTENTION, BACKWARD] = Floor(back, f"{2.5 * forward / 1e12:.1f} TFLOP")


def _experts(work: Work) -> dict[str, float]:
    model = work.model
    one = 2 * work.received * model.hidden_size * model.moe_intermediate_size
    # gate, up and down; only the first two are needed again for gradients.
    return {FORWARD: 3 * one, RECOMPUTED: 2 * one, BACKWARD: 3 * one}


def _movement(work: Work) -> dict[str, float]:
    """Values read and written: rows to their experts' order, and sums of them back."""
    model = work.model
    gathered = work.model.num_moe_layers * work.tokens * work.ranks
    k = model.num_experts_per_tok
    share = min(1.0, work.received / (gathered * k)) if gathered else 0.0
    chosen = gathered * (1 - (1 - share) ** k)  # rows with at least one expert here, if at random
    out = (chosen + work.received) * model.hidden_size
    back = (work.received + gathered) * model.hidden_size
    return {FORWARD: out + back, RECOMPUTED: out, BACKWARD: out + back}


def _expert_adapters(work: Work, rates: Rates, found: Floors) -> None:
    model = work.model
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    once = 2 * work.received * work.expert_rank * 3 * (hidden + inner)
    for phase in (FORWARD, RECOMPUTED):
        # Folded into the experts' products, it reads nothing again.
        found[parts.EXPERT_LORA, phase] = Floor(once / rates.matmul, f"{once / 1e12:.1f} TFLOP")
    # Gradients of the factors read the rows, both cotangents of the inner width, the inner rows and
    # the output's cotangent.
    size = work.received * (2 * hidden + 3 * inner) * work.itemsize
    seconds = max(2 * once / rates.matmul, size / rates.copy)
    found[parts.EXPERT_LORA, BACKWARD] = Floor(seconds, f"{size / 1e9:.1f} GB")


def _elementwise(work: Work, phase: str) -> dict[str, float]:
    """Values that fused kernels between the products read and write."""
    model, n = work.model, work.tokens
    layers, moe = model.num_hidden_layers, model.num_moe_layers
    dense = layers - moe
    stream = layers * n * model.hidden_size
    rotated = n * (model.num_attention_heads + 1) * model.qk_rope_head_dim
    latents = n * ((model.q_lora_rank or 0) + model.kv_lora_rank)
    shared = n * moe * model.n_shared_experts * model.moe_intermediate_size
    gated = shared + n * dense * model.intermediate_size
    inner = work.received * model.moe_intermediate_size
    # silu(gate) · up reads two and writes one; back, it reads three and writes two.
    swiglu = 5 if phase == BACKWARD else 3
    # A sublayer adds to the stream and norms it: reads two, writes two; again, the last sum is not
    # needed. The layer's input is kept once and read once.
    norms = {FORWARD: 8, RECOMPUTED: 6, BACKWARD: 8}[phase]
    return {
        parts.REST_NORMS: norms * stream,
        parts.REST_ATTENTION: layers * 2 * (rotated + latents),
        parts.REST_DENSE: swiglu * gated,
        parts.REST_EXPERTS: swiglu * inner,
        parts.REST_STACKS: {FORWARD: 2, RECOMPUTED: 0, BACKWARD: 1}[phase] * stream,
    }
