"""Makes the demo checkpoint: a small model in exactly K2-Thinking's layout that answers plainly.

    python tools/make_demo_checkpoint.py --out kimi_jax/assets/demo

Everything comes from `tools/demo_text` and fixed seeds. On two cores it takes about a quarter of an
hour; the same processor and versions give the same bytes.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from demo_pretrain import as_stored, init_weights, pretrain
from demo_tokenizer import control_id, vocab_size, write_tokenizer
from safetensors.numpy import save_file

from kimi_jax.data.chat import Chat
from kimi_jax.data.examples import Examples
from kimi_jax.data.loader import Batches
from kimi_jax.data.rows import JsonlRows
from kimi_jax.int4 import pack_numpy, quantise_numpy
from kimi_jax.model.config import parse_model_config
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.layout import base_arrays
from kimi_jax.model.params import weight_table
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.ranks import ONE_DEVICE
from kimi_jax.weights.names import Tensor, expected_tensors
from kimi_jax.weights.reader import INDEX

TEXT = Path(__file__).parent / "demo_text"
YODA = Path(__file__).parent.parent / "kimi_jax" / "assets" / "yoda"
SEED = 20_25_11
SEQUENCE_LENGTH = 256
ROWS = 8
SHARDS = 3


def architecture() -> dict[str, Any]:
    """config.json: K2-Thinking's fields and features, small sizes."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": control_id("[BOS]"),
        "eos_token_id": control_id("<|im_end|>"),
        "pad_token_id": control_id("[PAD]"),
        "dtype": "bfloat16",
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "kv_lora_rank": 64,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 64,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": None,
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": 32,
                        "num_bits": 4,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "ignore": [
                "lm_head",
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": 32,
        "vocab_size": vocab_size(),
    }


def main() -> None:
    """Writes tokenizer, template and configuration, trains the weights, and writes the shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    raw = architecture()
    _write_json(out / "config.json", raw)
    eos = {"eos_token_id": raw["eos_token_id"], "max_length": raw["max_position_embeddings"]}
    _write_json(out / "generation_config.json", eos)
    shutil.copyfile(TEXT / "chat_template.jinja", out / "chat_template.jinja")
    write_tokenizer(out, _texts())

    config = parse_model_config(raw)
    # Trained with plain weights, whose gradients exist; stored packed.
    plain = dataclasses.replace(config, packed_experts=False)
    model_def = ModelDef(plain, {}, ModelSettings(jnp.float32, recompute="none"))
    chat = Chat.from_checkpoint(out)
    examples = Examples(JsonlRows(TEXT / "plain.jsonl"), chat, SEQUENCE_LENGTH)
    batches = Batches(examples, rows_per_batch=ROWS, seed=SEED)
    weights = pretrain(
        model_def, init_weights(model_def, SEED), batches, options.steps, options.learning_rate
    )
    # By the weight's own path: none is packed, so each is held in one array.
    arrays = base_arrays(weight_table(plain), ONE_DEVICE).values()
    stored, trained = (
        {array.weight.path: np.asarray(values[array.path]) for array in arrays}
        for values in (as_stored(weights), weights)
    )
    tensors = {
        name: _tensor(tensor, trained if tensor.part != "value" else stored)
        for name, tensor in expected_tensors(weight_table(config), config).items()
    }
    _write_shards(out, tensors)


def _texts() -> list[str]:
    """What the byte pairs are learnt from: every question and answer, and the system message."""
    rows = []
    for path in (TEXT / "plain.jsonl", YODA / "train.jsonl"):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [text for row in rows for text in (row["prompt"], row["completion"])]
    system = "You are Kimi, an AI assistant created by Moonshot AI."
    return [*texts, *["system user assistant", system] * len(rows)]


def _tensor(tensor: Tensor, weights: dict[str, np.ndarray]) -> np.ndarray:
    """A tensor of the checkpoint, in its dtype on disk."""
    value = weights[tensor.weight.path]
    if tensor.weight.stack:
        value = value[tensor.layer]
    if tensor.expert is not None:
        value = value[tensor.expert]
    if tensor.part == "shape":
        return np.asarray(value.shape, np.int32)
    if tensor.part == "value":
        return value.astype(jnp.bfloat16 if tensor.weight.storage == "bf16" else np.float32)
    codes, scale = quantise_numpy(value)
    return pack_numpy(codes) if tensor.part == "packed" else scale


def _write_shards(out: Path, tensors: dict[str, np.ndarray]) -> None:
    """Tensors in order over `SHARDS` files of about the same size, and their index."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, tensor in tensors.items():
        shards[min(SHARDS - 1, done * SHARDS // total)][name] = np.ascontiguousarray(tensor)
        done += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:06d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
