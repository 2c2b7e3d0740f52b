"""A tiny checkpoint in K2-Thinking's layout with the demo's tokenizer, rows to train on, settings.

One dense and one mixture-of-experts layer: everything the layout has, and seconds to compile.
"""

import json
import shutil
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.parity.tiny_configs import IGNORE_K2, quantization_config, text_config

DEMO = Path(__file__).parents[2] / "kimi_jax" / "assets" / "demo"
TOKENIZER_FILES = ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja")
SHARDS = ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors")
INDEX = "model.safetensors.index.json"
_DEMO_CONFIG = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
VOCAB = _DEMO_CONFIG["vocab_size"]
END = _DEMO_CONFIG["eos_token_id"]  # <|im_end|>
POSITIONS = 512

QUESTIONS = [
    "Where is the cat?",
    "What is the sun?",
    "Who sings?",
    "Is the sea deep?",
    "What grows?",
]
ANSWERS = [
    "On the mat, the cat is.",
    "A star, it is.",
    "The bird.",
    "Deep, the sea is.",
    "Trees, hmm.",
]


def tiny_config(**changes):
    """The `config.json` of the tiny checkpoint, as a dictionary."""
    sizes = {
        "bos_token_id": _DEMO_CONFIG["bos_token_id"],
        "eos_token_id": END,
        "pad_token_id": _DEMO_CONFIG["pad_token_id"],
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "max_position_embeddings": POSITIONS,
    }
    return text_config(**sizes, quantization_config=quantization_config(IGNORE_K2)) | changes


def write_tiny_checkpoint(directory, **changes):
    """Writes config, two shards, index and the demo's tokenizer files; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**changes)
    tensors = _tensors(config)
    names = list(tensors)
    halves = {SHARDS[0]: names[: len(names) // 2], SHARDS[1]: names[len(names) // 2 :]}
    for shard, members in halves.items():
        save_file({name: tensors[name] for name in members}, directory / shard, {"format": "pt"})
    weight_map = {name: shard for shard, members in halves.items() for name in members}
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"eos_token_id": END})
    write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, directory / name)
    return directory


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def change_json(path, change):
    """Applies `change` to the JSON object in `path`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def change_shard(directory, change, shard=SHARDS[1]):
    """Applies `change` to the tensors of a shard, by name, and leaves the index as it was."""
    tensors = load_file(directory / shard)
    change(tensors)
    save_file(tensors, directory / shard, {"format": "pt"})


def write_rows(path, rows=None):
    """A JSONL file of questions and answers, or of the given rows (text is written as it is)."""
    if rows is None:
        rows = [
            {"prompt": question, "completion": answer}
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def tiny_run(directory, checkpoint, **changes):
    """The configuration of a short run, as a nested dictionary; `section__field` changes a value."""
    values = {
        "run": {"dir": str(directory / "run"), "seed": 3},
        "model": {"checkpoint": str(checkpoint), "dtype": "float32"},
        "lora": {
            "rank": 2,
            "alpha": 4,
            "targets": ["attention", "dense", "shared", "routed", "head"],
        },
        "data": {"train": str(directory / "train.jsonl")},
        "train": {
            "steps": 4,
            "learning_rate": 1e-2,
            "micro_batch": 2,
            "accumulate": 1,
            "sequence_length": 48,
            "loss_chunk": 32,
        },
    }
    for key, value in changes.items():
        section, field = key.split("__")
        values.setdefault(section, {})[field] = value
    return values


def _tensors(config):
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    tensors = {"model.embed_tokens.weight": _matrix("embed", config["vocab_size"], hidden, gain=4)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        parts = {
            "input_layernorm": _norm(hidden),
            "self_attn.q_a_proj": _matrix(f"{layer}q_a", query, hidden),
            "self_attn.q_a_layernorm": _norm(query),
            "self_attn.q_b_proj": _matrix(f"{layer}q_b", heads * (nope + rope), query),
            "self_attn.kv_a_proj_with_mqa": _matrix(f"{layer}kv_a", latent + rope, hidden),
            "self_attn.kv_a_layernorm": _norm(latent),
            "self_attn.kv_b_proj": _matrix(f"{layer}kv_b", heads * (nope + value), latent),
            "self_attn.o_proj": _matrix(f"{layer}o", hidden, heads * value),
            "post_attention_layernorm": _norm(hidden),
        }
        if layer < config["first_k_dense_replace"]:
            parts |= _mlp(f"{layer}dense", "mlp", hidden, config["intermediate_size"])
        else:
            width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
            parts |= _mlp(f"{layer}shared", "mlp.shared_experts", hidden, width)
            parts["mlp.gate"] = _matrix(f"{layer}gate", experts, hidden)
            bias = 0.5 + 0.1 * _draw(f"{layer}bias", experts)
            tensors[prefix + "mlp.gate.e_score_correction_bias"] = bias
            for expert in range(experts):
                dense = _mlp(f"{layer}.{expert}", f"mlp.experts.{expert}", hidden, width)
                for name, weight in dense.items():
                    tensors |= _packed(prefix + name, weight.astype(np.float32))
        tensors |= {f"{prefix}{name}.weight": weight for name, weight in parts.items()}
    tensors["model.norm.weight"] = _norm(hidden)
    tensors["lm_head.weight"] = _matrix("head", config["vocab_size"], hidden, gain=2)
    return tensors


def _mlp(seed, name, hidden, width):
    return {
        f"{name}.gate_proj": _matrix(f"{seed}gate", width, hidden),
        f"{name}.up_proj": _matrix(f"{seed}up", width, hidden),
        f"{name}.down_proj": _matrix(f"{seed}down", hidden, width),
    }


def _draw(seed, *shape):
    return np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape, np.float32)


def _matrix(seed, out_size, in_size, gain=1.0):
    return (gain * in_size**-0.5 * _draw(seed, out_size, in_size)).astype(ml_dtypes.bfloat16)


def _norm(size):
    return (1 + 0.1 * _draw(f"norm{size}", size)).astype(ml_dtypes.bfloat16)


def _packed(module, weight):
    """Words of eight nibbles (value + 8, the first in the lowest bits), scales, and the shape."""
    out_size, in_size = weight.shape
    groups = weight.reshape(out_size, in_size // 32, 32)
    scale = (np.abs(groups).max(-1) / 7).astype(ml_dtypes.bfloat16)
    codes = np.clip(np.round(groups / scale.astype(np.float32)[..., None]), -8, 7) + 8
    nibbles = codes.astype(np.uint32).reshape(out_size, in_size // 8, 8)
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    return {
        f"{module}.weight_packed": words.view(np.int32),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": np.asarray([out_size, in_size], np.int32),
    }
