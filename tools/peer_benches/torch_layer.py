"""A mixture-of-experts layer in PyTorch, experts packed: the route that `ours` is compared with.

Frozen weights are plain tensors; adapters are leaves. Decoded experts live for one product and are
decoded again in the backward pass. Adapters are in the activations' dtype, which costs no casts.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]

from tools.peer_benches.case import SCALE, Sizes, local_experts
from tools.peer_benches.torch_operations import (
    combine,
    dispatch,
    expert_projection,
    linear,
    swiglu,
)

LATENT_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, as transformers has it
BACKENDS = ("flash", "mem_efficient", "cudnn", "math")
# Of PyTorch's attention: backend, and whether values are padded to the keys' width for it.
ATTENTIONS = {
    "cudnn": ("cudnn", False),
    "cudnn, padded values": ("cudnn", True),
    "flash, padded values": ("flash", True),
    "memory-efficient": ("mem_efficient", False),
    "math": ("math", False),
}


def allow_only(backend: str) -> None:
    """Lets PyTorch's attention use one backend, or fail."""
    for name in BACKENDS:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == backend)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, padded: bool) -> Tensor:
    """Causal attention of [B, N, T, H] heads with values [B, N, T, U]."""
    if not padded:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    out = F.scaled_dot_product_attention(q, k, wide, is_causal=True, scale=scale)
    return out[..., : v.shape[-1]]


def yarn_rotation(config: Mapping[str, Any], length: int) -> tuple[Tensor, Tensor, float]:
    """cos and sin [T, R/2], fp32, and the attention's scale, of a config with YaRN (arXiv:2309.00071)."""
    yarn, theta = config["rope_scaling"], config["rope_theta"]
    pairs = config["qk_rope_head_dim"] // 2
    context = yarn["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(context / (times * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), config["qk_rope_head_dim"] - 1)
    number = torch.arange(pairs, dtype=torch.float32)
    slowed = ((number - low) / (high - low if high > low else 0.001)).clamp(0, 1)
    plain = theta ** -(number / pairs)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * (
        plain * (1 - slowed) + plain / yarn["factor"] * slowed
    )

    def multiplier(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn["factor"]) + 1.0 if yarn["factor"] > 1 else 1.0

    both = multiplier(yarn["mscale_all_dim"])
    size = multiplier(yarn["mscale"]) / both
    head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return angle.cos() * size, angle.sin() * size, head**-0.5 * both**2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the neighbours of [..., T, R] by [T, R/2]; fp32 inside."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def join_heads(
    q: Tensor, up: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor, nope: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of attention of queries [B, T, N, H+R], keys and values [B, T, N, H+U], rotary keys [B, T, R]."""
    q, up = q.transpose(1, 2), up.transpose(1, 2)
    key = rotate(rope_key, cos, sin)[:, None].expand(-1, up.shape[1], -1, -1)
    queries = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), dim=-1)
    return queries, torch.cat((up[..., :nope], key), dim=-1), up[..., nope:].contiguous()


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


class Layer:
    """The layer on one GPU; with `ranks` over 1, that of one GPU alone among as many.

    What it would receive is made of copies of its own rows then.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        sizes: Sizes,
        weights: Mapping[str, Tensor],
        adapters: Mapping[str, Tensor],
        length: int,
        ranks: int = 1,
    ) -> None:
        """`weights` and `adapters` are what `torch_weights` makes."""
        self.sizes, self.weights, self.adapters, self.ranks = sizes, weights, adapters, ranks
        device = weights["router"].device
        cos, sin, self.softmax_scale = yarn_rotation(config, length)
        self.cos, self.sin = cos.to(device), sin.to(device)
        self.padded = False
        self.chosen: Tensor | None = None  # experts [tokens, K] instead of the router's own
        self.routed_to: Tensor | None = None  # the latest choice
        self.rows_here: int | None = None  # of the experts here, if known: saves asking the GPU
        self.use_eager()

    def use_eager(self) -> None:
        """Undoes `use_compiled`."""
        self.join_heads, self.silu_product = join_heads, silu_product

    def use_compiled(self) -> None:
        """Lets torch.compile fuse what stands between the products."""
        self.join_heads = torch.compile(join_heads, dynamic=False)
        self.silu_product = torch.compile(silu_product, dynamic=False)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D], with both residual connections."""
        eps = self.sizes.rms_norm_eps
        x = x + self._attention(self._norm(x, "input_layernorm", eps))
        normed = self._norm(x, "post_attention_layernorm", eps).flatten(0, 1)
        return x + (self._routed(normed) + self._shared(normed)).view_as(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [N, K] and their fp32 weights; sigmoid scores of fp32 logits, normed and scaled."""
        scores = F.linear(x.float(), self.weights["router"].float()).sigmoid()
        experts = scores.detach().topk(self.sizes.num_experts_per_tok, dim=-1).indices
        if self.chosen is not None:
            experts = self.chosen
        self.routed_to = experts
        weights = scores.gather(1, experts)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * self.sizes.routed_scaling_factor

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        adapter = self.adapters[f"{name}.a"], self.adapters[f"{name}.b"]
        return linear(x.reshape(-1, x.shape[-1]), self.weights[name], adapter, SCALE)

    def _attention(self, x: Tensor) -> Tensor:
        sizes, heads = self.sizes, self.sizes.num_attention_heads
        batch, length, _ = x.shape
        q_latent = self._norm(self._linear(x, "q_a_proj"), "q_a_layernorm", LATENT_NORM_EPS)
        q = self._linear(q_latent, "q_b_proj").view(batch, length, heads, -1)
        joint = self._linear(x, "kv_a_proj_with_mqa").view(batch, length, -1)
        latent, rope_key = joint.split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), dim=-1)
        latent = self._norm(latent.contiguous(), "kv_a_layernorm", LATENT_NORM_EPS)
        up = self._linear(latent, "kv_b_proj").view(batch, length, heads, -1)
        q, k, v = self.join_heads(q, up, rope_key, self.cos, self.sin, sizes.qk_nope_head_dim)
        out = attend(q, k, v, self.softmax_scale, self.padded)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return self._linear(out, "o_proj").view_as(x)

    def _shared(self, x: Tensor) -> Tensor:
        gate, up = self._linear(x, "shared.gate_proj"), self._linear(x, "shared.up_proj")
        return self._linear(self.silu_product(gate, up), "shared.down_proj")

    def _routed(self, x: Tensor) -> Tensor:
        experts, weights = self.route(x)
        if self.ranks > 1:
            x, weights = x.repeat(self.ranks, 1), weights.repeat(self.ranks, 1)
            experts = experts.repeat(self.ranks, 1)
        order, places, ends = self._sort(experts)
        row_of = order // experts.shape[1]
        rows = dispatch(x, row_of, places)
        by_row = weights.reshape(-1).gather(0, order)
        adapters = self.adapters
        gate_b, up_b = adapters["experts.gate_proj.b"], adapters["experts.up_proj.b"]
        rank = gate_b.shape[-1]
        # Gate and up are one product; their adapters' second factors stand beside each other.
        b = torch.cat((F.pad(gate_b, (0, rank)), F.pad(up_b, (rank, 0))), dim=1)
        a = torch.cat((adapters["experts.gate_proj.a"], adapters["experts.up_proj.a"]), dim=1)
        both = expert_projection(rows, self._packed("gate_up_proj"), a, b, ends, SCALE)
        hidden = swiglu(both, by_row)
        a, b = adapters["experts.down_proj.a"], adapters["experts.down_proj.b"]
        y = expert_projection(hidden, self._packed("down_proj"), a, b, ends, SCALE)
        y = combine(y, row_of, places)
        return y if self.ranks == 1 else y.view(self.ranks, -1, y.shape[-1]).sum(dim=0)

    def _packed(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"experts.{name}.words"], self.weights[f"experts.{name}.scale"]

    @torch.no_grad()
    def _sort(self, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Assignments by expert, each row's places among them, and the ends of the experts' rows."""
        here = local_experts(self.sizes, self.ranks)
        keys, order = experts.reshape(-1).clamp(max=here).int().sort(stable=True)
        first = torch.arange(1, here + 1, device=keys.device, dtype=torch.int32)
        ends = torch.searchsorted(keys, first, out_int32=True)
        count = int(ends[-1]) if self.rows_here is None else self.rows_here
        order = order[:count]
        places = torch.full((experts.numel(),), -1, device=keys.device, dtype=torch.int32)
        places[order] = torch.arange(count, device=keys.device, dtype=torch.int32)
        return order, places.view_as(experts), ends
