"""The foreign models: transformers' DeepseekV3 on a checkpoint of the family, in float32.

Checkpoints are read here tensor by tensor and put into a model built from the config, strictly;
packed experts go through compressed-tensors' own decompression. `per_expert=True` replaces the
fused expert tensors by one `nn.Linear` per projection under its HF name, so that ordinary peft
LoRA reaches every routed expert.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

INDEX = "model.safetensors.index.json"
WRAPPER = "language_model."  # prefix of the text stack inside the multimodal releases
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
VISION = ("vision_tower.", "mm_projector.")


class Expert(nn.Module):
    """One routed expert under its HF names."""

    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PerExpertLinears(nn.ModuleList):
    """Stands in for the fused experts: same call, one module per expert.

    Experts without a token run too, on no rows, so that their factors get zero gradients and not
    `None`: AdamW skips a parameter without gradient, decay included.
    """

    def __init__(self, config):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        super().__init__(Expert(hidden, width) for _ in range(config.n_routed_experts))

    def forward(self, x, top_k_index, top_k_weights):
        result = torch.zeros_like(x)
        for number, expert in enumerate(self):
            rows, slots = torch.where(top_k_index == number)
            part = expert(x[rows]) * top_k_weights[rows, slots, None]
            result = result.index_add(0, rows, part)
        return result


def read_config(folder):
    """The text model's config of a checkpoint, and the whole file's content."""
    outer = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return outer.get("text_config", outer), outer


def read_tensors(folder):
    """All tensors of a checkpoint by the names on disk, through the index where there is one."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    else:
        where = None
    files = sorted(set(where.values())) if where else ["model.safetensors"]
    tensors = {}
    for file in files:
        with safe_open(folder / file, "pt") as shard:
            names = list(shard.keys())
            if where is not None:
                expected = sorted(name for name, place in where.items() if place == file)
                assert sorted(names) == expected, f"{file} does not hold what the index says"
            tensors |= {name: shard.get_tensor(name) for name in names}
    return tensors


def decompress(tensors, config):
    """Replace packed triples by the bf16 weights that compressed-tensors makes of them."""
    result = {name: tensor for name, tensor in tensors.items() if ".weight_" not in name}
    packed = sorted(name for name in tensors if name.endswith(".weight_packed"))
    if not packed:
        return result
    group = config["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme(
        targets=group["targets"], weights=QuantizationArgs(**group["weights"])
    )
    for name in packed:
        stem = name.removesuffix("weight_packed")
        parts = {part: tensors[stem + part] for part in ("weight_scale", "weight_shape")}
        parts["weight_packed"] = tensors[name]
        parts["weight_shape"] = torch.Size(parts["weight_shape"].tolist())
        result[stem + "weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return result


def text_tensors(folder):
    """The text stack's tensors by their HF names without a wrapper's prefix, unpacked."""
    config, outer = read_config(folder)
    tensors = decompress(read_tensors(folder), config)
    if outer is config:
        return tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(VISION)}
    assert all(name.startswith(WRAPPER) for name in tensors)
    return {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items()}


def hf_config(folder):
    """transformers' config object: the text config under the model type it has registered."""
    config = dict(read_config(folder)[0])
    for key in ("quantization_config", "auto_map", "dtype", "torch_dtype"):
        config.pop(key, None)
    config["model_type"] = "deepseek_v3"
    return DeepseekV3Config.from_dict(config)


def expert_name(layer, expert, projection):
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


def fuse(tensors, config):
    """Stack per-expert weights into transformers' 3D tensors: gate rows first, then up rows."""
    tensors = dict(tensors)
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        gate, up, down = (
            torch.stack(
                [
                    tensors.pop(expert_name(layer, expert, projection))
                    for expert in range(config.n_routed_experts)
                ]
            )
            for projection in PROJECTIONS
        )
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    return tensors


def load_model(folder, per_expert=False):
    """DeepseekV3ForCausalLM in float32, eval mode, nothing missing and nothing left over."""
    config = hf_config(folder)
    model = DeepseekV3ForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    tensors = {name: tensor.float() for name, tensor in text_tensors(folder).items()}
    if per_expert:
        for layer in model.model.layers[config.first_k_dense_replace :]:
            layer.mlp.experts = PerExpertLinears(config)
        # peft rewrites adapters for model types whose experts it knows to be fused; not these
        model.config.model_type = "deepseek_v3_per_expert"
    else:
        tensors = fuse(tensors, config)
    model.load_state_dict(tensors, strict=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def forward(model, tokens, positions=None, **options):
    """The model's output for int arrays [B, T]; an all-ones mask, so that jumps mean no packing."""
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(
        input_ids=tokens,
        position_ids=torch.as_tensor(positions, dtype=torch.long),
        attention_mask=torch.ones_like(tokens),
        use_cache=False,
        **options,
    )


def logits(model, tokens, positions=None):
    """numpy logits [B, T, V] in the model's dtype."""
    with torch.no_grad():
        return forward(model, tokens, positions).logits.numpy()
