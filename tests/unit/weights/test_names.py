"""The weight table and HF's names, against published facts about the released checkpoints."""

import json
import math

import numpy as np
import pytest

from kimi_jax.model.config import parse_model_config
from kimi_jax.model.params import weight_table
from kimi_jax.weights.names import expected_tensors
from kimi_jax.weights.reader import DTYPES
from tests.unit import golden

# The numbers of K2-Thinking's config.json; what is not here is as in the tiny checkpoint.
K2_THINKING = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
}


@pytest.fixture(scope="module")
def config():
    path = golden.checkpoint_directory("k2_thinking") / "config.json"
    return parse_model_config(json.loads(path.read_text(encoding="utf-8")) | K2_THINKING)


@pytest.fixture(scope="module")
def table(config):
    return weight_table(config)


@pytest.fixture(scope="module")
def tensors(config, table):
    return expected_tensors(table, config)


def test_parameters(config, table):
    by_role = {}
    for weight in table:
        by_role[weight.role] = by_role.get(weight.role, 0) + weight.parameters
    assert sum(by_role.values()) == 1_026_408_232_448
    assert by_role["routed"] == 1_014_686_023_680
    assert (
        by_role["routed"] * 8 // 384 + sum(by_role.values()) - by_role["routed"] == 32_861_500_928
    )


def test_tensors(tensors):
    assert len(tensors) == 208_215
    assert sum(tensor.part == "packed" for tensor in tensors.values()) == 69_120


def test_bytes(tensors):
    """594 GB, as published: packed words, scales and shapes as the files hold them."""
    total = sum(
        math.prod(tensor.shape) * np.dtype(DTYPES[tensor.dtypes[0]]).itemsize
        for tensor in tensors.values()
    )
    assert total == 594_205_904_896


@pytest.mark.parametrize(
    ("name", "dtypes", "shape"),
    [
        ("model.embed_tokens.weight", ("BF16",), (163840, 7168)),
        ("lm_head.weight", ("BF16",), (163840, 7168)),
        ("model.norm.weight", ("BF16",), (7168,)),
        ("model.layers.0.mlp.gate_proj.weight", ("BF16",), (18432, 7168)),
        ("model.layers.0.mlp.down_proj.weight", ("BF16",), (7168, 18432)),
        ("model.layers.60.self_attn.q_a_proj.weight", ("BF16",), (1536, 7168)),
        ("model.layers.60.self_attn.q_a_layernorm.weight", ("BF16",), (1536,)),
        ("model.layers.60.self_attn.q_b_proj.weight", ("BF16",), (12288, 1536)),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight", ("BF16",), (576, 7168)),
        ("model.layers.60.self_attn.kv_a_layernorm.weight", ("BF16",), (512,)),
        ("model.layers.60.self_attn.kv_b_proj.weight", ("BF16",), (16384, 512)),
        ("model.layers.60.self_attn.o_proj.weight", ("BF16",), (7168, 8192)),
        ("model.layers.1.mlp.gate.weight", ("BF16",), (384, 7168)),
        ("model.layers.1.mlp.gate.e_score_correction_bias", ("F32", "BF16"), (384,)),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", ("BF16",), (2048, 7168)),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", ("BF16",), (7168, 2048)),
        ("model.layers.60.mlp.experts.383.up_proj.weight_packed", ("I32",), (2048, 896)),
        ("model.layers.60.mlp.experts.383.up_proj.weight_scale", ("BF16",), (2048, 224)),
        ("model.layers.60.mlp.experts.383.up_proj.weight_shape", ("I32", "I64"), (2,)),
        ("model.layers.1.mlp.experts.0.down_proj.weight_packed", ("I32",), (7168, 256)),
        ("model.layers.1.mlp.experts.0.down_proj.weight_scale", ("BF16",), (7168, 64)),
    ],
)
def test_published_tensors(tensors, name, dtypes, shape):
    assert (tensors[name].dtypes, tensors[name].shape) == (dtypes, shape)
