"""Random weights and adapters of the PyTorch layer, and experts chosen to given loads."""

import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]

from tools.peer_benches.case import Sizes, local_experts

CODE_DEVIATION = 4.61  # of codes drawn evenly from -8 to 7


def linear_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """[out, in] of the layer's linear weights but the routed experts'."""
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    shared = sizes.moe_intermediate_size * sizes.n_shared_experts
    keys_and_values = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
    return {
        "q_a_proj": (sizes.q_lora_rank, hidden),
        "q_b_proj": (heads * sizes.qk_head_dim, sizes.q_lora_rank),
        "kv_a_proj_with_mqa": (sizes.kv_lora_rank + sizes.qk_rope_head_dim, hidden),
        "kv_b_proj": (keys_and_values, sizes.kv_lora_rank),
        "o_proj": (hidden, heads * sizes.v_head_dim),
        "shared.gate_proj": (shared, hidden),
        "shared.up_proj": (shared, hidden),
        "shared.down_proj": (hidden, shared),
    }


def expert_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """[out, in] of a routed expert's weights."""
    hidden, inner = sizes.hidden_size, sizes.moe_intermediate_size
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}


def random_weights(
    sizes: Sizes, ranks: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Frozen weights: matrices keep the size of what they multiply, norms are about 1."""
    weights = {
        name: torch.randn(shape, device=device, dtype=dtype) * shape[1] ** -0.5
        for name, shape in linear_shapes(sizes).items()
    }
    router = (sizes.n_routed_experts, sizes.hidden_size)
    weights["router"] = torch.randn(router, device=device, dtype=dtype) * router[1] ** -0.5
    norms = {
        "input_layernorm": sizes.hidden_size,
        "post_attention_layernorm": sizes.hidden_size,
        "q_a_layernorm": sizes.q_lora_rank,
        "kv_a_layernorm": sizes.kv_lora_rank,
    }
    for name, width in norms.items():
        weights[name] = (1 + 0.1 * torch.randn(width, device=device)).to(dtype)
    hidden, inner = sizes.hidden_size, sizes.moe_intermediate_size
    experts = local_experts(sizes, ranks)
    for name, out, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        words = torch.randint(
            -(2**31), 2**31, (experts, out, width // 8), device=device, dtype=torch.int32
        )
        typical = 1 / (CODE_DEVIATION * width**0.5)
        scale = typical * (0.5 + torch.rand(experts, out, width // 32, device=device))
        weights[f"experts.{name}.words"] = words
        weights[f"experts.{name}.scale"] = scale.bfloat16()
    return weights


def random_adapters(
    sizes: Sizes, ranks: int, rank: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Leaves `NAME.a` [r, in] and `NAME.b` [out, r]; the experts' with a leading dimension."""
    adapters = {}

    def add(name: str, lead: tuple[int, ...], shape: tuple[int, int]) -> None:
        out, width = shape
        for factor, size, typical in (
            ("a", (*lead, rank, width), width**-0.5),
            ("b", (*lead, out, rank), 0.1 * rank**-0.5),
        ):
            values = torch.randn(size, device=device, dtype=dtype).mul_(typical)
            adapters[f"{name}.{factor}"] = values.requires_grad_()

    for name, shape in linear_shapes(sizes).items():
        add(name, (), shape)
    for name, shape in expert_shapes(sizes).items():
        add(f"experts.{name}", (local_experts(sizes, ranks),), shape)
    return adapters


def chosen_experts(loads: tuple[int, ...], tokens: int, seed: int = 0) -> Tensor:
    """Experts [tokens, K], int64, different ones for each token, of which each occurs as often as told.

    The experts' runs, none longer than the tokens, are laid out over K rows of tokens one after the
    other: no column has the same expert twice. Columns are then shuffled.
    """
    assert sum(loads) % tokens == 0, "loads are not a whole number of experts a token"
    assert max(loads) <= tokens, "an expert has more assignments than there are tokens"
    runs = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    columns = runs.view(-1, tokens).t()
    generator = torch.Generator().manual_seed(seed)
    return columns[torch.randperm(tokens, generator=generator)].contiguous()
