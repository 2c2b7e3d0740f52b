"""The PyTorch layer against transformers' own DeepseekV3 layer in fp32: outputs and all gradients.

transformers' layer runs eagerly with `W + alpha/rank · B · A` in place of each weight, so that its
gradients of A and B come from another formula and other code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]

from tools.peer_benches.case import SCALE, Sizes, local_experts, sizes_of
from tools.peer_benches.torch_layer import Layer
from tools.peer_benches.torch_operations import kernels, plain_decode
from tools.peer_benches.torch_weights import linear_shapes, random_adapters, random_weights
from tools.peer_benches.transformers_config import hf_config

# Largest relative error that counts as rounding. A bf16 result has eight bits, and passes some ten
# roundings.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BATCH, LENGTH, RANK = 2, 128, 8


@dataclass(frozen=True)
class Check:
    """The largest relative error of output and gradients, whose it is, and how many were compared."""

    error: float
    of: str
    compared: int
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it is rounding; NaN is not."""
        return self.error <= self.allowed


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖ in fp32."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def check_layer(
    config: Mapping[str, Any], device: str, dtype: torch.dtype, ranks: int, padded: bool = False
) -> Check:
    """Compares a small layer; heads and everything else as in `config`.

    Args:
        config: the contents of a `config.json`.
        device: to compute the PyTorch layer on.
        dtype: of its activations, fp32 or bf16. On a GPU grouped products need bf16.
        ranks: as for `Layer`.
        padded: as `Layer.padded`.
    """
    torch.manual_seed(0)
    config = {**config, **SMALL}
    sizes = sizes_of(config)
    weights = random_weights(sizes, ranks, device, dtype)
    adapters = random_adapters(sizes, ranks, RANK, device, dtype)
    x = torch.randn(BATCH, LENGTH, sizes.hidden_size, device=device).to(dtype).requires_grad_()
    dy = torch.randn(x.shape, device=device).to(dtype)
    layer = Layer(config, sizes, weights, adapters, LENGTH, ranks)
    layer.padded = padded
    with torch.no_grad():
        reference = _Reference(config, sizes, weights, ranks)
        layer.chosen = reference.choose(x, adapters)
    y = layer(x)
    y.backward(dy)
    found = {"output": y.detach(), "input": x.grad}
    found |= {name: leaf.grad for name, leaf in adapters.items()}
    wanted = reference.gradients(x, adapters, dy)
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return Check(errors[worst], worst, len(errors), TOLERANCE[dtype])


def check_kernels(device: str) -> dict[str, float]:
    """Relative errors of the Triton kernels to their plain forms; decoding has to be exact."""
    from tools.peer_benches import torch_operations as plain

    torch.manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (3, 40, 28), device=device, dtype=torch.int32)
    scale = torch.rand(3, 40, 7, device=device).bfloat16()
    fast = kernels(words)
    rows = torch.randn(300, 1100, device=device).bfloat16()
    places = torch.randint(-1, 300, (200, 8), device=device, dtype=torch.int32)
    weight = torch.rand(300, device=device)
    d_out = torch.randn(300, 550, device=device).bfloat16()
    pairs = {
        "decode": (fast.decode(words, scale), plain_decode(words, scale)),
        "gather_sum": (fast.gather_sum(rows, places), plain.plain_gather_sum(rows, places)),
        "swiglu": (fast.swiglu(rows, weight), plain.plain_swiglu(rows, weight)),
    }
    names = ("swiglu gradient", "swiglu weight's gradient")
    given = (rows, weight, d_out)
    both = zip(fast.swiglu_gradient(*given), plain.plain_swiglu_gradient(*given), strict=True)
    pairs |= dict(zip(names, both, strict=True))
    return {name: relative_error(*pair) for name, pair in pairs.items()}


class _Reference:
    """transformers' layer in fp32 on the CPU, with the same weights."""

    def __init__(
        self, config: Mapping[str, Any], sizes: Sizes, weights: Mapping[str, Tensor], ranks: int
    ) -> None:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

        foreign = hf_config(config, attention="eager", experts="eager")
        self.layer = hf.DeepseekV3DecoderLayer(foreign, layer_idx=0).eval()
        self.rotary = hf.DeepseekV3RotaryEmbedding(foreign)
        self.sizes, self.ranks = sizes, ranks
        self.frozen = {
            _hf_name(name): weights[name].float().cpu()
            for name in (*linear_shapes(sizes), *(n for n in weights if n.endswith("norm")))
        }
        self.frozen["mlp.gate.weight"] = weights["router"].float().cpu()
        self.frozen["mlp.gate.e_score_correction_bias"] = torch.zeros(sizes.n_routed_experts)
        self.experts = {
            name: plain_decode(
                *(weights[f"experts.{name}.{part}"].cpu() for part in ("words", "scale"))
            ).float()
            for name in ("gate_up_proj", "down_proj")
        }

    def gradients(self, x: Tensor, adapters: Mapping[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
        """Output, and gradients of input and adapters, by name."""
        leaves = {name: v.detach().float().cpu().requires_grad_() for name, v in adapters.items()}
        x = x.detach().float().cpu().requires_grad_()
        y = self._call(x, leaves)
        y.backward(dy.float().cpu())
        results = {"output": y.detach(), "input": x.grad}
        results |= {name: leaf.grad for name, leaf in leaves.items()}
        return {name: value.to(dy.device) for name, value in results.items()}

    def choose(self, x: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
        """The experts that it chooses: rounding may decide a near tie otherwise elsewhere."""
        found = []

        def look(_: Any, arguments: tuple[Any, ...]) -> None:
            found.extend(v for v in arguments if v.dtype in (torch.int64, torch.int32))

        handle = self.layer.mlp.experts.register_forward_pre_hook(look)
        self._call(x.float().cpu(), {name: v.float().cpu() for name, v in adapters.items()})
        handle.remove()
        return found[0].to(x.device).long()

    def _call(self, x: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
        parameters = dict(self.frozen)
        for name in linear_shapes(self.sizes):
            change = adapters[f"{name}.b"] @ adapters[f"{name}.a"]
            parameters[_hf_name(name)] = self.frozen[_hf_name(name)] + SCALE * change
        change = {
            name: SCALE * adapters[f"experts.{name}.b"] @ adapters[f"experts.{name}.a"]
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        both = torch.cat((change["gate_proj"], change["up_proj"]), dim=1)
        missing = self.sizes.n_routed_experts - local_experts(self.sizes, self.ranks)
        for name, part, times in (
            ("gate_up_proj", both, 1),
            ("down_proj", change["down_proj"], self.ranks),
        ):
            # Alone among ranks, a layer adds its experts' outputs once a copy of the rows, others never.
            whole = times * (self.experts[name] + part)
            rest = torch.zeros(missing, *whole.shape[1:])
            parameters[f"mlp.experts.{name}"] = torch.cat((whole, rest))
        positions = torch.arange(x.shape[1])[None]
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        arguments = {
            "hidden_states": x,
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": self.rotary(x, positions),
        }
        out = torch.func.functional_call(self.layer, parameters, (), arguments, strict=True)
        return out[0] if isinstance(out, tuple) else out


def _hf_name(name: str) -> str:
    if name in ("input_layernorm", "post_attention_layernorm"):
        return f"{name}.weight"
    if name.startswith("shared."):
        return f"mlp.shared_experts.{name.removeprefix('shared.')}.weight"
    return f"self_attn.{name}.weight"
