"""A checkpoint is matched with its config, name by name, and loaded bit by bit."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kimi_jax.errors import MissingFileError, UserError
from kimi_jax.int4 import unpack_numpy
from kimi_jax.model.transformer import ModelDef
from kimi_jax.weights.checkpoint import open_checkpoint, resolve_checkpoint
from kimi_jax.weights.load import load_base
from tests.unit import golden
from tests.unit.weights.raw_safetensors import Raw, change_tensors

GATE = "model.layers.1.mlp.experts.0.gate_proj"


@pytest.fixture
def damaged(copy):
    """A copy of K2-Thinking's layout in which `change` edited the tensors."""

    def damage(change):
        directory = copy()
        change_tensors(directory, change)
        return directory

    return damage


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def test_undamaged_copy_opens(damaged):
    """The ground for the tests below: writing the tensors again harms nothing."""
    checkpoint = open_checkpoint(damaged(lambda tensors: None))
    assert checkpoint.left_aside == {}
    assert checkpoint.tensors.keys() == checkpoint.entries.keys()


def test_every_difference_is_listed(damaged):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = Raw("BF16", (1,), b"\0\0")
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = head._replace(shape=head.shape[::-1])
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]._replace(
            dtype="F16"
        )
        packed = tensors[f"{GATE}.weight_packed"]
        tensors[f"{GATE}.weight_packed"] = Raw("I8", (32, 32), packed.data)

    directory = damaged(change)
    lines = refusal(open_checkpoint, directory).splitlines()
    assert lines[0] == f"{directory}: 6 differences from what config.json implies"
    assert set(lines[1:-1]) == {
        "  - model.norm.weight: missing; required BF16 [64]",
        "  - model.layers.0.self_attn.q_proj.weight: not a tensor of this architecture",
        "  - lm_head.weight: found shape [64, 128], required [128, 64]",
        "  - model.embed_tokens.weight: found dtype F16, required BF16",
        f"  - {GATE}.weight_packed: found shape [32, 32], required [32, 8]",
        f"  - {GATE}.weight_packed: found dtype I8, required I32",
    }
    assert lines[-1].startswith("Nothing was loaded.")


@pytest.mark.parametrize("part", ["packed", "scale", "shape"])
def test_each_part_of_a_packed_weight_is_required(damaged, part):
    directory = damaged(lambda tensors: tensors.pop(f"{GATE}.weight_{part}"))
    assert f"\n  - {GATE}.weight_{part}: missing; required " in refusal(open_checkpoint, directory)


def test_scales_must_be_bf16(damaged):
    """Public converters write fp16 scales; rounding them would change the release's weights."""

    def change(tensors):
        scale = tensors[f"{GATE}.weight_scale"]
        tensors[f"{GATE}.weight_scale"] = scale._replace(dtype="F16")

    found = refusal(open_checkpoint, damaged(change))
    assert f"{GATE}.weight_scale: found dtype F16, required BF16" in found


def test_hundreds_of_differences_are_all_listed(damaged):
    """Guards the whole list: which tensors to download again is what a user needs to know."""
    gone = []

    def change(tensors):
        gone.extend(name for name in tensors if ".experts." in name)
        for name in gone:
            del tensors[name]

    found = refusal(open_checkpoint, damaged(change))
    assert ": 144 differences from what config.json implies" in found
    assert len(gone) == 144
    assert all(f"\n  - {name}: missing; required" in found for name in gone)


def test_config_of_another_checkpoint(copy):
    directory = copy()
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 4}))
    found = refusal(open_checkpoint, directory)
    assert "model.layers.3.input_layernorm.weight: missing; required BF16 [64]" in found


def test_vision_tensors_are_left_aside_in_wrapped_checkpoints_only(copy, damaged):
    assert open_checkpoint(copy("k25")).left_aside == {"vision tower and projector": 9}

    def change(tensors):
        tensors["vision_tower.x"] = Raw("BF16", (1,), b"\0\0")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = Raw("F32", (1,), b"\0" * 4)

    found = refusal(open_checkpoint, damaged(change))
    assert "1 difference from" in found
    assert "vision_tower.x: not a tensor of this architecture" in found
    assert "inv_freq" not in found


def test_wrapped_names_need_their_prefix(copy):
    """A text model's tensors under a multimodal config, or the reverse, are another checkpoint."""
    directory = copy("k25")
    change_tensors(
        directory,
        lambda tensors: [
            tensors.__setitem__(name.removeprefix("language_model."), tensors.pop(name))
            for name in list(tensors)
        ],
    )
    found = refusal(open_checkpoint, directory)
    assert "language_model.model.embed_tokens.weight: missing" in found


def test_absent_directory(tmp_path):
    with pytest.raises(MissingFileError, match="no such checkpoint directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_demo_is_in_the_package():
    assert resolve_checkpoint("demo").parts[-3:] == ("kimi_jax", "assets", "demo")
    assert resolve_checkpoint("some/where").parts == ("some", "where")


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_base_has_the_shapes_that_the_model_declares(name):
    declared = ModelDef(golden.checkpoint(name).config).base_shapes
    loaded = golden.base(name)
    assert {p: (s.shape, s.dtype) for p, s in declared.items()} == {
        p: (v.shape, v.dtype) for p, v in loaded.items()
    }


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_every_layer_and_expert_holds_the_files_bits(name):
    """Codes, scales and plain weights, each in its own place: a swapped expert or layer shows."""
    checkpoint, base = golden.checkpoint(name), golden.base(name)
    compared = 0
    for tensor_name, tensor in checkpoint.tensors.items():
        stored = checkpoint.entries[tensor_name].read()
        path, in_stack = tensor.weight.path, bool(tensor.weight.stack)
        if tensor.part == "shape":
            continue
        leaf = {"packed": "values", "scale": "scale", "value": "weight"}[tensor.part]
        held = base.get(f"{path}.{leaf}", base.get(path))
        place = (tensor.layer,) * in_stack + (() if tensor.expert is None else (tensor.expert,))
        held = np.asarray(held[place] if place else held)
        if tensor.part == "packed":
            assert held.dtype == ml_dtypes.int4
            assert np.array_equal(held.astype(np.int8), unpack_numpy(stored)), tensor_name
        elif tensor.part == "scale":
            assert held.tobytes() == np.ascontiguousarray(stored.T).tobytes(), tensor_name
        else:
            assert np.array_equal(held, stored.astype(held.dtype)), tensor_name
        compared += 1
    shapes = sum(tensor.part == "shape" for tensor in checkpoint.tensors.values())
    assert compared + shapes == len(checkpoint.tensors)


def test_correction_bias_may_be_bf16_and_is_held_in_fp32(damaged):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            values = np.frombuffer(tensors[name].data, np.float32).astype(ml_dtypes.bfloat16)
            tensors[name] = tensors[name]._replace(dtype="BF16", data=values.tobytes())

    base = load_base(open_checkpoint(damaged(change)))
    held = base["moe_layers.mlp.gate.e_score_correction_bias"]
    assert held.dtype == jnp.float32
    exact = golden.base("k2_thinking")["moe_layers.mlp.gate.e_score_correction_bias"]
    assert held.shape[0] > 1
    assert np.array_equal(held, exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_shape_tensor_may_be_int64(damaged):
    """As compressed-tensors itself writes it."""

    def change(tensors):
        tensors[f"{GATE}.weight_shape"] = Raw("I64", (2,), np.array([32, 64]).tobytes())

    load_base(open_checkpoint(damaged(change)))


def test_contradicting_shape_tensor(damaged):
    """Written for the transposed weight: its words mean something else than we would read."""

    def change(tensors):
        tensors[f"{GATE}.weight_shape"] = Raw("I32", (2,), np.int32([64, 32]).tobytes())

    found = refusal(load_base, open_checkpoint(damaged(change)))
    assert found == (
        f"{GATE}.weight_shape: says [64, 32], but config.json and the packed tensor say [32, 64]"
    )


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_progress_ends_at_all_bytes(name):
    """Those of the language model: what is left aside is not waited for."""
    checkpoint = golden.checkpoint(name)
    calls = []
    load_base(checkpoint, lambda done, total: calls.append((done, total)))
    total = sum(checkpoint.entries[name].nbytes for name in checkpoint.tensors)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
