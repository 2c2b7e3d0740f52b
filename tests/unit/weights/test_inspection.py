"""What `inspect` finds out about a checkpoint, and what it refuses."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from kimi_jax.errors import UserError
from kimi_jax.int4 import pack_numpy, unpack_numpy
from kimi_jax.weights.inspection import inspect_checkpoint, refuse_misread
from kimi_jax.weights.inspection_view import print_inspection
from tests.unit import golden
from tests.unit.data.conftest import write_checkpoint
from tests.unit.weights.raw_safetensors import Raw, change_tensors


def recoded(copy, change_codes):
    """A copy whose packed experts hold other codes: `change_codes` of int8 [out, in]."""

    def change(tensors):
        for name, raw in tensors.items():
            if name.endswith(".weight_packed"):
                words = np.frombuffer(raw.data, np.int32).reshape(raw.shape)
                changed = pack_numpy(change_codes(unpack_numpy(words)))
                tensors[name] = raw._replace(data=changed.tobytes())

    directory = copy()
    change_tensors(directory, change)
    return directory


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_golden_checkpoints(name):
    directory = golden.checkpoint_directory(name)
    found = inspect_checkpoint(directory)
    files = list(directory.glob("*.safetensors"))
    assert found.files.shards == len(files)
    assert found.files.bytes == sum(file.stat().st_size for file in files)
    assert found.files.tensor_bytes == found.files.index_total_size
    assert found.files.not_in_index == ()
    assert found.left_aside == ({"vision tower and projector": 9} if name == "k25" else {})
    assert found.router_dtypes == {"BF16": 2}
    assert found.correction_bias_dtypes == {"F32": 2}
    assert found.tokenizer is None
    refuse_misread(found)


def test_parameters():
    """By hand: 2 layers of 8 experts of 3 · 64 · 32, of which a token meets 3 of 8."""
    found = inspect_checkpoint(golden.checkpoint_directory("k2_thinking"))
    routed = found.roles["routed"]
    assert routed.parameters == 2 * 8 * 3 * 64 * 32
    assert routed.active == 2 * 3 * 3 * 64 * 32
    assert routed.bytes == routed.parameters // 2 + routed.parameters // 32 * 2
    assert found.total.parameters == sum(share.parameters for share in found.roles.values())
    assert found.total.parameters - found.total.active == routed.parameters - routed.active
    assert found.roles["embedding"].bytes == 128 * 64 * 2


def test_nibbles_of_a_sound_checkpoint():
    nibbles = inspect_checkpoint(golden.checkpoint_directory("k2_thinking")).nibbles
    assert nibbles.packing == "offset_binary"
    assert nibbles.moonshot_rule
    assert nibbles.verdict.startswith("offset binary confirmed; codes -7 to 7")
    assert nibbles.histogram[-8] == 0
    assert max(nibbles.histogram, key=nibbles.histogram.get) == 0
    # Three projections of one expert in each of the two layers' three samples.
    assert len(nibbles.tensors) == 9
    assert sum(nibbles.histogram.values()) == 9 * 64 * 32
    for layer, expert in ((1, 0), (2, 4), (2, 7)):
        assert f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight_packed" in nibbles.tensors


def test_unpacked_experts_have_no_nibbles():
    assert inspect_checkpoint(golden.checkpoint_directory("moonlight")).nibbles is None


def test_twos_complement_is_recognised(copy):
    """As one public converter packs: every code would be read 8 too high or too low."""
    directory = recoded(copy, lambda codes: (codes ^ np.int8(-8)).clip(-8, 7))
    found = inspect_checkpoint(directory)
    assert found.nibbles.packing == "twos_complement"
    with pytest.raises(UserError, match="looks like two's complement") as caught:
        refuse_misread(found)
    assert str(directory) in str(caught.value)


def test_other_rule_of_quantisation_is_recognised(copy):
    """absmax / 7.5 uses -8: sound, but requantising it by absmax / 7 would not return its codes."""

    def use_lowest(codes):
        codes = codes.copy()
        codes[codes == -7] = -8
        return codes

    nibbles = inspect_checkpoint(recoded(copy, use_lowest)).nibbles
    assert nibbles.packing == "offset_binary"
    assert not nibbles.moonshot_rule
    assert "not absmax / 7 codes" in nibbles.verdict
    assert nibbles.share_of_lowest > 0.01


def test_groups_that_do_not_reach_seven(copy):
    nibbles = inspect_checkpoint(recoded(copy, lambda codes: codes.clip(-5, 5))).nibbles
    assert nibbles.share_of_full_groups == 0
    assert not nibbles.moonshot_rule


def test_flat_codes_are_undecided(copy):
    rng = np.random.default_rng(0)
    directory = recoded(copy, lambda codes: rng.integers(-8, 8, codes.shape).astype(np.int8))
    found = inspect_checkpoint(directory)
    assert found.nibbles.packing == "undecided"
    refuse_misread(found)


def test_contradicting_shape_tensors_are_all_listed(copy):
    names = [f"model.layers.{n}.mlp.experts.7.down_proj.weight_shape" for n in (1, 2)]

    def change(tensors):
        for name in names:
            tensors[name] = Raw("I32", (2,), np.int32([32, 64]).tobytes())

    directory = copy()
    change_tensors(directory, change)
    with pytest.raises(UserError, match="2 weight_shape tensors contradict") as caught:
        inspect_checkpoint(directory)
    for name in names:
        assert f"\n  - {name}: says [32, 64], required [64, 32]" in str(caught.value)


def test_damaged_scales(copy):
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale"

    def change(tensors):
        scale = np.full(tensors[name].shape, np.nan, ml_dtypes.bfloat16)
        tensors[name] = tensors[name]._replace(data=scale.tobytes())

    directory = copy()
    change_tensors(directory, change)
    with pytest.raises(UserError, match=f"{name}: holds values that are not finite"):
        inspect_checkpoint(directory)


def test_shards_beside_the_index_are_named(copy):
    directory = copy()
    shutil.copy(directory / "model-00001-of-000003.safetensors", directory / "old.safetensors")
    assert inspect_checkpoint(directory).files.not_in_index == ("old.safetensors",)


@pytest.fixture
def with_tokenizer(copy):
    """A checkpoint with a vocabulary; the embedding is widened to it."""
    directory = copy()
    config = json.loads((directory / "config.json").read_text())
    write_checkpoint(directory)
    ours = json.loads((directory / "config.json").read_text())

    def change(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            shape = (ours["vocab_size"], 64)
            tensors[name] = Raw("BF16", shape, b"\0" * (2 * shape[0] * shape[1]))

    change_tensors(directory, change)
    (directory / "config.json").write_text(json.dumps(config | ours))
    return directory


def test_tokenizer_facts(with_tokenizer):
    facts = inspect_checkpoint(with_tokenizer).tokenizer
    assert facts.vocab_size == facts.ranks + 256
    assert facts.think_is_one_id
    assert facts.end_token == "<|im_end|>"
    assert facts.control["<|im_end|>"] == facts.end_id
    assert not any(name.startswith("<|reserved_token_") for name in facts.control)
    assert set(facts.probes) >= {"helloWorld", "don't"}
    assert all(facts.probes.values())


def test_reasoning_marks_may_be_ordinary_text(with_tokenizer):
    path = with_tokenizer / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {
        key: value
        for key, value in config["added_tokens_decoder"].items()
        if "think" not in value["content"]
    }
    path.write_text(json.dumps(config))
    assert not inspect_checkpoint(with_tokenizer).tokenizer.think_is_one_id


def test_everything_is_printed(with_tokenizer, copy):
    console = Console(width=200, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as captured:
        print_inspection(inspect_checkpoint(with_tokenizer), console)
        print_inspection(inspect_checkpoint(golden.checkpoint_directory("k25")), console)
        print_inspection(inspect_checkpoint(golden.checkpoint_directory("moonlight")), console)
    text = captured.get()
    for part in (
        "beta_fast 1,",
        "beta_fast 32,",
        "null (plain q_proj)",
        "rms_norm_eps",
        "offset binary confirmed",
        "vision tower and projector",
        "[BOS]",  # looks like markup
        "F32 (2)",
        "No tiktoken.model here",
        "there are no nibbles",
    ):
        assert part in text, part
