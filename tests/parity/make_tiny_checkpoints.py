"""Write three tiny random checkpoints in the on-disk layouts of the Kimi-K2 family.

    python tests/parity/make_tiny_checkpoints.py

`k2_thinking`: packed int4 experts, YaRN with beta_fast 1. `k25`: the same text stack inside the
multimodal wrapper, beta_fast 32, another rope_theta. `moonlight`: no query latent, plain bf16
experts, no YaRN, two shared experts. Every tensor is drawn from a generator seeded by its own
name, so adding one leaves the others as they were. Scales are chosen so that each classic mistake
(see README.md) moves the logits by far more than the tests' tolerance.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import tiny_configs
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SEED = 20251106


def draw(model, name, shape):
    """Standard normal numbers that depend on the model's and the tensor's name alone."""
    seed = zlib.crc32(f"{model}/{name}".encode())
    return np.random.default_rng([SEED, seed]).standard_normal(shape, dtype=np.float32)


def quantise(weight):
    """[out, in] float32 -> packed words, bf16 scales, shape: absmax / 7, codes -7..7."""
    out_size, in_size = weight.shape
    groups = weight.reshape(out_size, in_size // tiny_configs.GROUP, tiny_configs.GROUP)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = torch.round(groups / scale.float()[..., None]).clamp(-7, 7).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(codes.reshape(out_size, in_size), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([out_size, in_size], dtype=torch.int32),
    }


class TextStack:
    """Draws one text model, in float32, under its HF names (without a wrapper's prefix)."""

    def __init__(self, model, config):
        self.model = model
        self.config = config
        self.tensors = {}

    def linear(self, name, out_size, in_size, gain=1.0, row_gains=None):
        """A matrix whose outputs have the size `gain` for inputs of size one."""
        weight = draw(self.model, name, (out_size, in_size)) * gain / np.sqrt(in_size)
        if row_gains is not None:
            weight = weight * np.asarray(row_gains, np.float32)[:, None]
        self.tensors[name] = torch.from_numpy(weight.astype(np.float32))

    def norm(self, name, size):
        self.tensors[name] = torch.from_numpy(1.0 + 0.2 * draw(self.model, name, (size,)))

    def mlp(self, prefix, width, down_gain=1.0):
        hidden = self.config["hidden_size"]
        self.linear(f"{prefix}.gate_proj.weight", width, hidden)
        self.linear(f"{prefix}.up_proj.weight", width, hidden)
        self.linear(f"{prefix}.down_proj.weight", hidden, width, down_gain)

    def attention(self, prefix):
        c = self.config
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        # Latents are small (mean square about 0.04), so that their norms' eps can be seen; smaller
        # ones would make training, which divides by their size, a magnifier of rounding.
        small = 0.2
        if c["q_lora_rank"] is None:
            self.linear(f"{prefix}.q_proj.weight", heads * (nope + rope), c["hidden_size"])
        else:
            self.linear(f"{prefix}.q_a_proj.weight", c["q_lora_rank"], c["hidden_size"], small)
            self.norm(f"{prefix}.q_a_layernorm.weight", c["q_lora_rank"])
            self.linear(f"{prefix}.q_b_proj.weight", heads * (nope + rope), c["q_lora_rank"])
        gains = [small] * c["kv_lora_rank"] + [1.0] * rope
        name = f"{prefix}.kv_a_proj_with_mqa.weight"
        self.linear(name, len(gains), c["hidden_size"], row_gains=gains)
        self.norm(f"{prefix}.kv_a_layernorm.weight", c["kv_lora_rank"])
        rows = heads * (nope + c["v_head_dim"])
        self.linear(f"{prefix}.kv_b_proj.weight", rows, c["kv_lora_rank"])
        self.linear(f"{prefix}.o_proj.weight", c["hidden_size"], heads * c["v_head_dim"])

    def router(self, prefix):
        experts = self.config["n_routed_experts"]
        self.linear(f"{prefix}.weight", experts, self.config["hidden_size"], 1.5)
        name = f"{prefix}.e_score_correction_bias"
        bias = 0.5 + 0.15 * draw(self.model, name, (experts,))
        self.tensors[name] = torch.from_numpy(bias)

    def experts(self, prefix):
        for expert in range(self.config["n_routed_experts"]):
            self.mlp(f"{prefix}.{expert}", self.config["moe_intermediate_size"], 1.5)

    def build(self):
        c = self.config
        self.linear("model.embed_tokens.weight", c["vocab_size"], c["hidden_size"], 0.24)
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            self.norm(f"{prefix}.input_layernorm.weight", c["hidden_size"])
            self.attention(f"{prefix}.self_attn")
            self.norm(f"{prefix}.post_attention_layernorm.weight", c["hidden_size"])
            if layer < c["first_k_dense_replace"]:
                self.mlp(f"{prefix}.mlp", c["intermediate_size"])
                continue
            self.router(f"{prefix}.mlp.gate")
            self.experts(f"{prefix}.mlp.experts")
            shared = c["n_shared_experts"] * c["moe_intermediate_size"]
            self.mlp(f"{prefix}.mlp.shared_experts", shared)
        self.norm("model.norm.weight", c["hidden_size"])
        self.linear("lm_head.weight", c["vocab_size"], c["hidden_size"], 1.5)
        return self.tensors


def stored(tensors, packed):
    """The tensors as a release stores them: bf16, float32 biases, experts packed or bf16."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            result[name] = tensor
        elif packed and ".mlp.experts." in name:
            parts = quantise(tensor)
            result |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
        else:
            result[name] = tensor.to(torch.bfloat16)
    return result


def vision_tensors(model, config):
    """A handful of tensors under the names that a text-only reader must leave aside."""
    vision = config["vision_config"]
    width, patch = vision["vt_hidden_size"], vision["patch_size"]
    merged = width * vision["merge_kernel_size"][0] * vision["merge_kernel_size"][1]
    shapes = {
        "vision_tower.patch_embed.proj.weight": (width, 3, patch, patch),
        "vision_tower.patch_embed.proj.bias": (width,),
        "vision_tower.encoder.blocks.0.norm0.weight": (width,),
        "vision_tower.encoder.blocks.0.wqkv.weight": (3 * width, width),
        "mm_projector.pre_norm.weight": (width,),
        "mm_projector.proj.0.weight": (merged, merged),
        "mm_projector.proj.0.bias": (merged,),
        "mm_projector.proj.2.weight": (vision["text_hidden_size"], merged),
        "mm_projector.proj.2.bias": (vision["text_hidden_size"],),
    }
    return {
        name: torch.from_numpy(draw(model, name, shape)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def shard(tensors, count, pattern):
    """Cut the tensors, in order, into `count` files of about equal size; no regard for layers."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total = sum(sizes.values())
    files, done = {}, 0
    for name in tensors:
        number = min(count, 1 + done * count // total)
        files.setdefault(pattern.format(number, count), []).append(name)
        done += sizes[name]
    return files, total


def write_checkpoint(folder, config, tensors, shards, pattern):
    """Write config, generation config, shards and index; shards name their format as HF's do."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    files, total = shard(tensors, shards, pattern)
    for file, names in files.items():
        part = {name: tensors[name].contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    where = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    generation = {"eos_token_id": 122, "max_length": 2048}
    for name, content in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("model.safetensors.index.json", index),
    ]:
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder.name}: {len(tensors)} tensors, {len(files)} shards, {size} bytes")
    assert size <= 300_000, size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=GOLDEN / "checkpoints")
    out = parser.parse_args().out
    released = "model-{:05d}-of-{:06d}.safetensors"  # five digits, then six

    config = tiny_configs.k2_thinking()
    tensors = stored(TextStack("k2_thinking", config).build(), packed=True)
    write_checkpoint(out / "k2_thinking", config, tensors, 3, released)

    config = tiny_configs.k25()
    text = stored(TextStack("k25", config["text_config"]).build(), packed=True)
    tensors = {f"language_model.{name}": tensor for name, tensor in text.items()}
    tensors = vision_tensors("k25", config) | tensors
    write_checkpoint(out / "k25", config, tensors, 2, released)

    config = tiny_configs.moonlight()
    tensors = stored(TextStack("moonlight", config).build(), packed=False)
    write_checkpoint(out / "moonlight", config, tensors, 2, "model-{}-of-{}.safetensors")


if __name__ == "__main__":
    main()
