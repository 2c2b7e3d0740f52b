"""An architecture comes from `config.json` alone: numbers are read, never assumed, or refused."""

import copy
import json
import math

import pytest

from kimi_jax.errors import MissingFileError, UserError
from kimi_jax.model.config import load_model_config, parse_model_config, yarn_multiplier
from tests.unit import golden


def raw_config(name="k2_thinking"):
    path = golden.checkpoint_directory(name) / "config.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def raw():
    return raw_config()


def refusal(raw):
    with pytest.raises(UserError) as caught:
        parse_model_config(raw)
    return str(caught.value)


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_traps_are_read_from_the_file(name):
    """The fields in which releases of this family differ; a preset would be wrong for one of them."""
    raw = raw_config(name)
    text = raw.get("text_config", raw)
    config = load_model_config(golden.checkpoint_directory(name))
    for field in ("rms_norm_eps", "routed_scaling_factor", "rope_theta", "num_experts_per_tok"):
        assert getattr(config, field) == text[field], field
    assert config.prefix == ("language_model." if name == "k25" else "")
    assert config.packed_experts == (name != "moonlight")
    assert config.q_lora_rank == (None if name == "moonlight" else 40)
    assert config.eos_token_ids == (122,)
    if name == "moonlight":
        assert config.yarn is None
    else:
        assert config.yarn is not None
        assert config.yarn.beta_fast == {"k2_thinking": 1.0, "k25": 32.0}[name]
        assert config.yarn.factor == 64.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-6), ("routed_scaling_factor", 2.5), ("rope_theta", 1e4)],
)
def test_other_values_arrive(raw, field, value):
    assert getattr(parse_model_config(raw | {field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"), [("factor", 32.0), ("beta_fast", 32.0), ("mscale", 0.7)]
)
def test_other_yarn_values_arrive(raw, field, value):
    raw["rope_scaling"][field] = value
    assert getattr(parse_model_config(raw).yarn, field) == value


def test_softmax_scales_of_the_releases(raw):
    """Facts of the released models: 192^-1/2 times YaRN's multiplier, squared."""
    raw |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    assert parse_model_config(raw).softmax_scale == pytest.approx(0.1446796, rel=1e-6)
    raw["rope_scaling"]["factor"] = 32.0
    assert parse_model_config(raw).softmax_scale == pytest.approx(0.1308608, rel=1e-6)
    raw["rope_scaling"] = None
    assert parse_model_config(raw).softmax_scale == pytest.approx(0.0721688, rel=1e-5)
    assert yarn_multiplier(1.0, 1.0) == 1.0


REQUIRED = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "norm_topk_prob",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "n_group",
    "topk_group",
]


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_fields(raw, field):
    del raw[field]
    assert f"\n  - {field} is missing; required: " in refusal(raw)


@pytest.mark.parametrize("field", ["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
def test_missing_yarn_fields(raw, field):
    """beta_fast above all: the usual default, 32, is wrong for K2-Thinking."""
    del raw["rope_scaling"][field]
    assert refusal(raw).endswith(
        f"\n  - rope_scaling.{field} is missing; required: a number above 0"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "64", "hidden_size is '64'; required: an integer of at least 1"),
        ("hidden_size", 64.0, "hidden_size is 64.0; required: an integer of at least 1"),
        ("hidden_size", True, "hidden_size is True; required: an integer of at least 1"),
        ("hidden_size", None, "hidden_size is None; required: an integer of at least 1"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0; required: at least 1"),
        ("first_k_dense_replace", -1, "first_k_dense_replace is -1; required: at least 0"),
        ("q_lora_rank", 0, "q_lora_rank is 0; required: at least 1"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0.0; required: a number above 0"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'; required: a number above 0"),
        ("rms_norm_eps", math.nan, "rms_norm_eps is nan; required: a number above 0"),
        ("norm_topk_prob", 1, "norm_topk_prob is 1; required: true or false"),
        ("scoring_func", "softmax", "scoring_func is 'softmax'; kimi_jax computes 'sigmoid'"),
        ("topk_method", "greedy", "topk_method is 'greedy'; kimi_jax computes 'noaux_tc'"),
        ("n_group", 8, "n_group is 8; kimi_jax computes 1"),
        ("topk_group", 4, "topk_group is 4; kimi_jax computes 1"),
        ("moe_layer_freq", 2, "moe_layer_freq is 2; kimi_jax computes 1"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'; kimi_jax computes 'silu'"),
        ("attention_bias", True, "attention_bias is True; kimi_jax computes False"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True; kimi_jax computes False"),
        ("rope_interleave", False, "rope_interleave is False; kimi_jax computes True"),
        ("num_nextn_predict_layers", 1, "num_nextn_predict_layers is 1; kimi_jax computes 0"),
        (
            "num_experts_per_tok",
            9,
            "num_experts_per_tok is 9; required: at most n_routed_experts, 8",
        ),
        ("first_k_dense_replace", 4, "required: at most num_hidden_layers, 3"),
        ("qk_rope_head_dim", 15, "qk_rope_head_dim is 15; required: even"),
        ("hidden_size", 60, "hidden_size is 60; int4 groups need a multiple of 32"),
        ("moe_intermediate_size", 40, "moe_intermediate_size is 40; int4 groups need a multiple"),
        ("eos_token_id", None, "eos_token_id is None; required: a token id or a list of them"),
        ("eos_token_id", [1, "x"], "eos_token_id is [1, 'x']; required: a token id"),
        ("eos_token_id", True, "eos_token_id is True; required: a token id"),
        ("rope_scaling", {"type": "linear", "factor": 4.0}, "rope_scaling has type 'linear'"),
        (
            "rope_scaling",
            {"factor": 4.0},
            "rope_scaling has type None; kimi_jax computes yarn or null",
        ),
        ("rope_scaling", "yarn", "rope_scaling is 'yarn'; required: null or an object"),
        ("quantization_config", {"quant_method": "fp8"}, "quant_method is 'fp8'"),
        ("quantization_config", "int4", "quant_method is 'int4'"),
    ],
)
def test_refused_values(raw, field, value, message):
    """Each would otherwise load and compute another model."""
    found = refusal(raw | {field: value})
    assert found.startswith("config.json: cannot be used\n")
    assert message in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "float-quantized"}, "has format 'float-quantized' and 1 config_groups"),
        ({"config_groups": {}}, "has format 'pack-quantized' and 0 config_groups"),
        ({"config_groups": None}, "and 0 config_groups"),
        (
            {"config_groups": {"group_0": {"weights": None}}},
            "weights.num_bits is None; required: 4",
        ),
        ({"config_groups": {"group_0": None}}, "weights.num_bits is None; required: 4"),
        ({"config_groups": {"group_0": {}}}, "weights.num_bits is None; required: 4"),
    ],
)
def test_refused_quantisation(raw, change, message):
    raw["quantization_config"] |= change
    assert message in refusal(raw)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_bits", 8),
        ("type", "float"),
        ("symmetric", False),
        ("strategy", "channel"),
        ("group_size", 128),
    ],
)
def test_refused_quantisation_of_weights(raw, field, value):
    raw["quantization_config"]["config_groups"]["group_0"]["weights"][field] = value
    assert f"quantization_config weights.{field} is {value!r}; required: " in refusal(raw)


def test_sizes_of_unpacked_experts_are_free(raw):
    del raw["quantization_config"]
    assert parse_model_config(raw | {"moe_intermediate_size": 40}).moe_intermediate_size == 40


def test_all_problems_are_in_one_message(raw):
    raw |= {"hidden_act": "gelu", "n_group": 8, "hidden_size": -64}
    del raw["kv_lora_rank"], raw["rope_scaling"]["beta_fast"]
    assert len(refusal(raw).splitlines()) == 6


def test_rope_parameters_of_transformers_5(raw):
    """It saves one object in place of rope_theta and rope_scaling."""
    expected = parse_model_config(raw)
    scaling, theta = raw.pop("rope_scaling"), raw.pop("rope_theta")
    scaling["rope_type"] = scaling.pop("type")
    raw["rope_parameters"] = scaling | {"rope_theta": theta}
    assert parse_model_config(raw) == expected
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    assert parse_model_config(raw).yarn is None
    raw["rope_parameters"] = {"rope_type": "default"}
    assert "\n  - rope_parameters.rope_theta is missing" in refusal(raw)


def test_several_end_tokens(raw):
    assert parse_model_config(raw | {"eos_token_id": [122, 121]}).eos_token_ids == (122, 121)


def test_wrapped_config_is_read_from_its_text_part():
    raw = raw_config("k25")
    assert parse_model_config(raw).prefix == "language_model."
    changed = copy.deepcopy(raw)
    del changed["text_config"]["eos_token_id"]
    assert parse_model_config(changed | {"eos_token_id": 5}).eos_token_ids == (5,)
    assert "needs an object text_config" in refusal(raw | {"text_config": None})
    # Fields beside text_config are the wrapper's, not the model's.
    del changed["text_config"]["hidden_size"]
    assert "hidden_size is missing" in refusal(changed | {"hidden_size": 64})


def test_wrapper_that_ties_embeddings_is_refused():
    """The wrapper's own flag decides in transformers; the head would be the embedding."""
    raw = raw_config("k25")
    assert "tie_word_embeddings is True" in refusal(raw | {"tie_word_embeddings": True})


def test_other_families_are_refused(raw):
    for model_type in ("llama", None, ["kimi_k2"]):
        found = refusal(raw | {"model_type": model_type})
        assert (
            f"model_type is {model_type!r}; kimi_jax reads kimi_k2, deepseek_v3, kimi_k25" in found
        )


def test_files(tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere: no such checkpoint directory"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"config.json: not found"):
        load_model_config(tmp_path)
    path = tmp_path / "config.json"
    for content, message in {
        b"{": "not readable as JSON",
        b"\xff": "not readable as JSON",
        b"[1]": "found a list, required a JSON object",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_model_config(tmp_path)
        assert str(path) in str(caught.value)
