"""Checkpoints that are not what their config implies: refused by name, before a weight is read."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kimi_jax import generate, inspect, train
from tests.unit.commands.damage import (
    NORM,
    both,
    config,
    index,
    lengthen,
    overlapping_offsets,
    quantization,
    remove,
    shard,
    truncate,
    write,
)
from tests.unit.support import INDEX, SHARDS, change_shard, write_json

GATE = "model.layers.1.mlp.experts.3.gate_proj"


def fp8(raw):
    raw.clear()
    raw.update({"quant_method": "fp8", "weight_block_size": [128, 128]})


def eight_bits(raw):
    raw["config_groups"]["group_0"]["weights"] |= {"num_bits": 8, "group_size": 64}


def half_of(name):
    return lambda tensors: tensors.update({name: tensors[name][: len(tensors[name]) // 2].copy()})


def as_float32(name):
    return lambda tensors: tensors.update({name: tensors[name].astype(np.float32)})


YARN = {"type": "dynamic", "factor": 4.0}

CASES = {
    "config absent": (
        remove("config.json"),
        ["config.json: not found; an HF checkpoint directory has"],
    ),
    "config not JSON": (write("config.json", b"{"), ["config.json: not readable as JSON"]),
    "config a list": (
        write("config.json", b"[]"),
        ["config.json: found a list, required a JSON obj"],
    ),
    "another family": (
        config(model_type="llama"),
        ["model_type is 'llama'; kimi_jax reads kimi_k2, deepseek_v3, kimi_k25"],
    ),
    "fields missing and mistyped": (
        config(kv_lora_rank=None, hidden_size="64", n_group=2, norm_topk_prob=1),
        [
            "kv_lora_rank is missing; required: an integer of at least 1",
            "hidden_size is '64'; required: an integer of at least 1",
            "n_group is 2; kimi_jax computes 1",
            "norm_topk_prob is 1; required: true or false",
        ],
    ),
    "rope of another type": (
        config(rope_scaling=YARN),
        ["rope_scaling has type 'dynamic'; kimi_jax computes yarn or null"],
    ),
    "more experts a token than experts": (
        config(num_experts_per_tok=9),
        ["num_experts_per_tok is 9; required: at most n_routed_experts, 4"],
    ),
    "fp8": (
        quantization(fp8),
        ["quantization_config.quant_method is 'fp8'", "convert fp8 releases to bf16 first"],
    ),
    "eight bits": (
        quantization(eight_bits),
        ["weights.num_bits is 8; required: 4", "weights.group_size is 64; required: 32"],
    ),
    "neither index nor file": (
        remove(INDEX),
        [f"found neither {INDEX} nor model.safetensors; is the download complete?"],
    ),
    "index not JSON": (
        write(INDEX, b"weights"),
        [f"{INDEX}: not an index with an object weight_map"],
    ),
    "index without a map": (
        write(INDEX, b"{}"),
        [f"{INDEX}: not an index with an object weight_map"],
    ),
    "shard absent": (
        remove(SHARDS[1]),
        ["1 of 2 shards are not there", SHARDS[1], "Download them again"],
    ),
    "shard outside the directory": (
        index(lambda places: places.update({NORM: "../weights.safetensors"})),
        ["shards must be plain file names beside the index", f"{NORM}: '../weights.safetensors'"],
    ),
    "shard by an absolute path": (
        index(lambda places: places.update({NORM: "/tmp/weights.safetensors"})),
        ["shards must be plain file names", f"{NORM}: '/tmp/weights.safetensors'"],
    ),
    "index names the wrong shard": (
        index(lambda places: places.update({NORM: SHARDS[0]})),
        [
            "disagrees with the shards",
            f"{NORM}: the index places it in {SHARDS[0]}, which does not hold it",
            f"{NORM}: stands in {SHARDS[1]}, and the index places it in {SHARDS[0]}",
        ],
    ),
    "index leaves a tensor out": (
        index(lambda places: places.pop(NORM)),
        [f"{NORM}: stands in {SHARDS[1]}, and the index does not name it"],
    ),
    "tensors missing": (
        both(
            lambda tensors: [tensors.pop(name) for name in (NORM, f"{GATE}.weight_scale")],
            lambda places: [places.pop(name) for name in (NORM, f"{GATE}.weight_scale")],
        ),
        [
            "2 differences from what config.json implies",
            f"{NORM}: missing; required BF16 [64]",
            f"{GATE}.weight_scale: missing; required BF16 [32, 2]",
        ],
    ),
    "a tensor too many": (
        both(
            lambda tensors: tensors.update({"model.layers.2.norm.weight": np.ones(3, np.float32)}),
            lambda places: places.update({"model.layers.2.norm.weight": SHARDS[1]}),
        ),
        ["model.layers.2.norm.weight: not a tensor of this architecture", "Nothing was loaded"],
    ),
    "misshapen": (
        shard(half_of("lm_head.weight")),
        ["lm_head.weight: found shape [", "64], required ["],
    ),
    "mistyped": (shard(as_float32(NORM)), [f"{NORM}: found dtype F32, required BF16"]),
    "truncated": (truncate, [SHARDS[1], "truncated: download it again"]),
    "too long": (lengthen, [SHARDS[1], "too long: download it again"]),
    "no shard at all": (
        write(SHARDS[1], b"<html>"),
        ["6 bytes, which cannot hold a safetensors header"],
    ),
    "garbled header": (
        write(SHARDS[1], (5).to_bytes(8, "little") + b"{...}"),
        [SHARDS[1], "the header is not a safetensors header"],
    ),
    "offsets that do not fit": (overlapping_offsets, [SHARDS[1], "do not fit BF16 of shape [64]"]),
    "another model's config": (
        config(moe_intermediate_size=64),
        [
            "differences from what config.json implies",
            f"{GATE}.weight_packed: found shape [32, 8], required [64, 8]",
            "does config.json belong to it?",
        ],
    ),
    "vocabulary absent": (remove("tiktoken.model"), ["tiktoken.model is missing", "download it"]),
    "vocabulary not fetched": (
        write("tiktoken.model", b"version https://git-lfs.github.com/spec/v1\n"),
        ["tiktoken.model is a Git LFS pointer"],
    ),
    "vocabulary garbled": (
        write("tiktoken.model", b"IQ== 0\nnot base64! 1\nIg== zero\n"),
        [
            "tiktoken.model:2: 3 fields, 2 are required",
            "tiktoken.model:3: rank b'zero' is not a wh",
        ],
    ),
    "tokenizer_config absent": (
        remove("tokenizer_config.json"),
        ["tokenizer_config.json is missing"],
    ),
    "template absent": (
        remove("chat_template.jinja"),
        ["has no chat template: neither chat_template.jinja nor chat_template in"],
    ),
    "template of another family": (
        write("chat_template.jinja", b"{% for m in messages %}{{ m.content }}{% endfor %}"),
        ["is not a chat template of this family", "released with"],
    ),
    "template broken": (
        write("chat_template.jinja", b"{% for m in messages %}"),
        ["the chat template", "failed: Unexpected end of template"],
    ),
    "end tokens that disagree": (
        lambda checkpoint: write_json(checkpoint / "generation_config.json", {"eos_token_id": 3}),
        ["generation_config.json says 3", "They must agree"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_training_refuses(place, training_refused, name):
    change, required = CASES[name]
    change(place.checkpoint)
    message = training_refused()
    for part in required:
        assert part in message


@pytest.mark.parametrize("command", [generate, inspect])
@pytest.mark.parametrize("name", ["config absent", "truncated", "tensors missing", "mistyped"])
def test_other_commands_refuse(place, refused, command, name):
    change, required = CASES[name]
    change(place.checkpoint)
    prompt = ["--prompt", "Hi"] if command is generate else []
    message = refused(command, "--checkpoint", place.checkpoint, *prompt)
    for part in required:
        assert part in message


def test_a_vocabulary_larger_than_the_embedding(place, training_refused):
    """The embedding and the head are consistent, the tokenizer is another model's."""
    for name in SHARDS:
        tensors = load_file(place.checkpoint / name)
        for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            if tensor in tensors:
                tensors[tensor] = tensors[tensor][:-8].copy()
                rows = len(tensors[tensor])
        save_file(tensors, place.checkpoint / name, {"format": "pt"})
    config(vocab_size=rows)(place.checkpoint)
    message = training_refused()
    assert f"{rows + 8} in all, but the model's vocab_size is {rows}" in message
    assert "belong to another model" in message


def test_a_weight_shape_that_contradicts_its_tensor(place, refused):
    """Its contents are bytes: `train` reads them with the weights, `inspect` before."""
    name = f"{GATE}.weight_shape"
    change_shard(place.checkpoint, lambda t: t.update({name: np.asarray([32, 128], np.int32)}))
    message = refused(inspect, "--checkpoint", place.checkpoint)
    assert f"{name}: says [32, 128], required [32, 64]" in message
    message = refused(train, "--config", place.config)
    assert f"{name}: says [32, 128], but config.json and the packed tensor say [32, 64]" in message


def test_a_checkpoint_that_is_not_there(place, training_refused, refused):
    absent = place.folder / "absent"
    assert f"{absent}: no such checkpoint directory" in training_refused(
        f"model.checkpoint={absent}"
    )
    for command, prompt in ((generate, ["--prompt", "Hi"]), (inspect, [])):
        message = refused(command, "--checkpoint", absent, *prompt)
        assert f"{absent}: no such checkpoint directory" in message
