"""Adapters out and in: names, folding, configuration, and what is refused."""

import json
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kimi_jax.config import LoraSection
from kimi_jax.errors import MissingFileError, UserError
from kimi_jax.lora import adapter_shapes, plan_adapters
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.transformer import ModelDef
from kimi_jax.weights.export_peft import peft_parameters, write_peft
from kimi_jax.weights.import_peft import read_peft
from kimi_jax.weights.names import expected_tensors
from kimi_jax.weights.peft_config import PeftSettings, adapter_config
from tests.unit import golden

EVERYTHING = ("attention", "dense", "shared", "routed", "head")


def random_adapter(name, targets=EVERYTHING, **settings):
    section = LoraSection(rank=3, alpha=7.5, targets=targets, **settings)
    plan = plan_adapters(section, golden.checkpoint(name).table)
    rng = np.random.default_rng(1)
    shapes = adapter_shapes(plan)
    return plan, {path: rng.standard_normal(s).astype(np.float32) for path, s in shapes.items()}


def read(name, directory):
    checkpoint = golden.checkpoint(name)
    return read_peft(directory, checkpoint.config, checkpoint.table)


def assert_same(plan, arrays, other_plan, other_arrays):
    assert other_plan == plan
    assert list(other_plan) == list(plan)
    assert other_arrays.keys() == arrays.keys()
    for path, value in arrays.items():
        assert other_arrays[path].dtype == np.float32, path
        np.testing.assert_array_equal(other_arrays[path], value, err_msg=path)


def per_expert(plan, arrays, experts):
    """Shared factors repeated for each expert, as an adapter that was exported has them."""
    repeated = {}
    for path, adapter in plan.items():
        for factor in ("lora_A", "lora_B"):
            value = arrays[f"{path}.{factor}"]
            if adapter.weight.role == "routed" and value.ndim == 3:
                value = np.repeat(value[:, None], experts, axis=1)
            repeated[f"{path}.{factor}"] = value
    return repeated


@pytest.fixture
def written(tmp_path):
    """A copy of the stored adapter of k2_thinking, to be damaged."""
    shutil.copytree(golden.GOLDEN / "adapters" / "k2_thinking", tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_reads_what_peft_wrote(name):
    plan, arrays = read(name, golden.GOLDEN / "adapters" / name)
    assert_same(golden.plan(name), golden.adapter(name), plan, arrays)


def test_logits_of_an_adapter_that_peft_wrote():
    """A factor in the wrong layer, expert or projection moves the logits by far more."""
    plan, arrays = read("k2_thinking", golden.GOLDEN / "adapters" / "k2_thinking")
    expected = golden.gradients("k2_thinking")
    settings = ModelSettings(dtype=jnp.float32)
    model = ModelDef(golden.checkpoint("k2_thinking").config, plan, settings)
    adapters = {path: jnp.asarray(value) for path, value in arrays.items()}
    logits = model.bind(golden.base("k2_thinking"), adapters)(jnp.asarray(expected["tokens"]))
    assert np.abs(logits - expected["logits"]).max() <= 1e-4


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"expert_rank": 2, "expert_alpha": 1.25},
        {"expert_rank": 2, "expert_factors": "shared"},
        {"targets": ("kv_b_proj", "mlp.experts.down_proj")},
        {"targets": ("mlp.experts.gate_proj", "mlp.experts.up_proj")},
        {"targets": ("routed",)},
        {"targets": ("dense", "mlp.shared_experts.up_proj")},
        {"targets": ("lm_head",)},
    ],
    ids=str,
)
def test_round_trip_is_equal_in_every_bit(tmp_path, name, layout, settings):
    plan, arrays = random_adapter(name, **settings)
    config = golden.checkpoint(name).config
    write_peft(tmp_path / "out", plan, config, arrays, "base", layout)
    shared = settings.get("expert_factors") == "shared"
    if shared:
        arrays = per_expert(plan, arrays, config.n_routed_experts)
        plan, _ = random_adapter(name, **settings | {"expert_factors": "per_expert"})
    assert_same(plan, arrays, *read(name, tmp_path / "out"))


def test_per_expert_names_and_values():
    """Names are HF's, wrapper included; a shared factor stands once, or under each expert's name."""
    plan, arrays = random_adapter("k25", expert_factors="shared")
    config = golden.checkpoint("k25").config
    repeated = peft_parameters(plan, config, arrays)
    once = peft_parameters(plan, config, arrays, repeat_shared=False)
    stem = "base_model.model.language_model.model.layers.2.mlp.experts"
    stacked = arrays["moe_layers.mlp.experts.gate_proj.lora_A"]
    for expert in range(8):
        name = f"{stem}.{expert}.gate_proj.lora_A.weight"
        np.testing.assert_array_equal(repeated[name], stacked[1])
        assert name not in once
    np.testing.assert_array_equal(once[f"{stem}.gate_proj.lora_A.weight"], stacked[1])
    own = arrays["moe_layers.mlp.experts.gate_proj.lora_B"]
    np.testing.assert_array_equal(once[f"{stem}.5.gate_proj.lora_B.weight"], own[1, 5])
    assert "base_model.model.language_model.lm_head.lora_B.weight" in once


def test_fused_factors_fold_as_peft_unfolds_them(tmp_path):
    """PEFT's own formula: delta of expert e is B[:, e::E] · A[e·r:(e+1)·r] (ParamWrapper)."""
    plan, arrays = random_adapter("k2_thinking", expert_rank=2, targets=("routed",))
    config = golden.checkpoint("k2_thinking").config
    write_peft(tmp_path / "out", plan, config, arrays, None, "peft-fused")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.2.mlp.experts"
    experts, rank = config.n_routed_experts, 4
    a, b = (tensors[f"{stem}.base_layer.lora_{x}.weight"] for x in "AB")
    for expert in range(experts):
        delta = b[:, expert::experts] @ a[expert * rank : (expert + 1) * rank]
        expected = [
            arrays[f"moe_layers.mlp.experts.{p}.lora_B"][1, expert]
            @ arrays[f"moe_layers.mlp.experts.{p}.lora_A"][1, expert]
            for p in ("gate_proj", "up_proj")
        ]
        np.testing.assert_allclose(delta, np.concatenate(expected), atol=1e-5)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["rank_pattern"][r"mlp\.experts\.gate_up_proj"] == rank
    ratio = saved["alpha_pattern"][r"mlp\.experts\.gate_up_proj"] / rank
    assert ratio == pytest.approx(plan["moe_layers.mlp.experts.gate_proj"].scale)


def test_fused_adapter_of_full_rank_is_kept_whole(tmp_path):
    """An adapter trained on the fused parameter mixes gate and up: halving its rank would lose it."""
    plan, arrays = random_adapter("k2_thinking", targets=("routed",))
    config = golden.checkpoint("k2_thinking").config
    write_peft(tmp_path / "out", plan, config, arrays, None, "peft-fused")
    rng = np.random.default_rng(2)
    dense = {}

    def mix(tensors):
        for name in tensors:
            if name.endswith("base_layer.lora_B.weight"):
                tensors[name] = rng.standard_normal(tensors[name].shape).astype(np.float32)
        dense.update(tensors)

    change_tensors(tmp_path / "out", mix)
    read_plan, read_arrays = read("k2_thinking", tmp_path / "out")
    stem = "base_model.model.model.layers.1.mlp.experts.base_layer"
    a, b = (dense[f"{stem}.lora_{x}.weight"] for x in "AB")
    delta = b[:, 3::8] @ a[3 * 6 : 4 * 6] * plan["moe_layers.mlp.experts.gate_proj"].scale
    parts = []
    for projection in ("gate_proj", "up_proj"):
        path = f"moe_layers.mlp.experts.{projection}"
        assert read_plan[path].rank == 6
        change = read_arrays[f"{path}.lora_B"][0, 3] @ read_arrays[f"{path}.lora_A"][0, 3]
        parts.append(read_plan[path].scale * change)
    np.testing.assert_allclose(np.concatenate(parts), delta, rtol=1e-5, atol=1e-5)


def test_fused_head_of_a_wrapper_stands_outside_its_prefix(tmp_path):
    """transformers moves it there, and peft drops factors under the old name with a mere warning."""
    plan, arrays = random_adapter("k25", targets=("attention", "head"))
    config = golden.checkpoint("k25").config
    write_peft(tmp_path / "out", plan, config, arrays, None, "peft-fused")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    heads = sorted(name for name in names if "lm_head" in name)
    assert heads == [f"base_model.model.lm_head.lora_{x}.weight" for x in "AB"]


@pytest.mark.parametrize(
    "targets",
    [
        EVERYTHING,
        ("dense",),
        ("shared",),
        ("routed",),
        ("dense", "mlp.experts.up_proj"),
        ("mlp.shared_experts.gate_proj", "q_a_proj"),
    ],
    ids=str,
)
def test_target_modules_select_the_adapted_modules_and_no_others(targets):
    """Peft compares a module's name or its end; engines that make modules of it do the same."""
    plan, arrays = random_adapter("k2_thinking", targets=targets)
    config = golden.checkpoint("k2_thinking").config
    listed = adapter_config(plan, config, None, "peft")["target_modules"]
    tensors = expected_tensors(golden.checkpoint("k2_thinking").table, config)
    modules = {name.rsplit(".", 1)[0] for name in tensors}
    chosen = {m for m in modules if any(m == t or m.endswith(f".{t}") for t in listed)}
    adapted = {
        re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name)
        for name in peft_parameters(plan, config, arrays)
    }
    assert chosen == adapted


def test_patterns_give_each_module_its_rank_and_alpha():
    plan, arrays = random_adapter("k2_thinking", expert_rank=2, expert_alpha=1.25)
    config = golden.checkpoint("k2_thinking").config
    saved = adapter_config(plan, config, "name", "peft")
    alphas = {pattern: float(alpha) for pattern, alpha in saved["alpha_pattern"].items()}
    settings = PeftSettings(saved["r"], saved["lora_alpha"], saved["rank_pattern"], alphas, ())
    for name, value in peft_parameters(plan, config, arrays).items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = 1.25 if ".experts." in module else 7.5
            assert settings.of_module(module) == (value.shape[0], alpha), module
    assert saved["r"] == 3  # what engines without patterns read is not the experts'
    assert saved["base_model_name_or_path"] == "name"
    assert saved["use_rslora"] is False


def test_files_are_float32_with_the_metadata_that_loaders_ask_for(tmp_path):
    plan, arrays = random_adapter("moonlight", targets=("o_proj",))
    write_peft(tmp_path / "out", plan, golden.checkpoint("moonlight").config, arrays, None)
    data = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert length % 8 == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_narrower_factors_are_widened(written):
    stored = load_file(written / "adapter_model.safetensors")
    change_tensors(
        written, lambda t: t.update({n: v.astype(ml_dtypes.bfloat16) for n, v in stored.items()})
    )
    _, arrays = read("k2_thinking", written)
    expected = np.asarray(golden.adapter("k2_thinking")["lm_head.lora_A"])
    np.testing.assert_array_equal(
        arrays["lm_head.lora_A"], expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_output_directory_in_use_is_refused_and_untouched(tmp_path, layout):
    plan, arrays = random_adapter("moonlight", targets=("o_proj",))
    config = golden.checkpoint("moonlight").config
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_peft(tmp_path, plan, config, arrays, None, layout)
    with pytest.raises(UserError, match="is a file"):
        write_peft(tmp_path / "mine.txt", plan, config, arrays, None, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_stands_at_the_destination_after_a_failure(tmp_path, monkeypatch):
    plan, arrays = random_adapter("moonlight", targets=("o_proj",))

    def fail(path, tensors):
        path.write_bytes(b"half")
        assert not (tmp_path / "out").exists()
        raise OSError("the disk is gone")

    monkeypatch.setattr("kimi_jax.weights.export_peft.write_safetensors", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_peft(tmp_path / "out", plan, golden.checkpoint("moonlight").config, arrays, None)
    assert not list(tmp_path.iterdir())


def test_remains_of_a_killed_export_are_named(tmp_path):
    plan, arrays = random_adapter("moonlight", targets=("o_proj",))
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(UserError, match=r"\.out\.partial: found what an export to out left"):
        write_peft(tmp_path / "out", plan, golden.checkpoint("moonlight").config, arrays, None)


def test_factors_that_are_not_finite_are_refused(tmp_path):
    plan, arrays = random_adapter("moonlight", targets=("o_proj",))
    arrays["moe_layers.self_attn.o_proj.lora_B"][0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"moe_layers\.self_attn\.o_proj\.lora_B: holds NaN"):
        write_peft(tmp_path / "out", plan, golden.checkpoint("moonlight").config, arrays, None)


def test_fused_layout_refuses_one_half_of_gate_and_up(tmp_path):
    config = golden.checkpoint("k2_thinking").config
    plan, arrays = random_adapter("k2_thinking", targets=("mlp.experts.up_proj",))
    with pytest.raises(UserError, match=r"up_proj is adapted and mlp\.experts\.gate_proj is not"):
        write_peft(tmp_path / "out", plan, config, arrays, None, "peft-fused")
    write_peft(tmp_path / "out", plan, config, arrays, None, "peft")
    assert_same(plan, arrays, *read("k2_thinking", tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; required: 'LORA'"),
        ({"use_rslora": True}, "use_rslora is True; required: False"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; required: 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 0}, "r is 0; required: an integer of at least 1"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; required: a number above 0"),
        ({"rank_pattern": {"q_a_proj": -1}}, r"rank_pattern\['q_a_proj'\] is -1"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is not a regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; required: an object"),
        (
            {"rank_pattern": {"q_a_proj": 9}},
            r"layers\.0\.self_attn\.q_a_proj.lora_A.weight: found shape \[4, 64\], required \[9, 64\]",
        ),
        (
            {"alpha_pattern": {r"layers\.2\.self_attn\.q_a_proj": 9}},
            "self_attn.q_a_proj: rank and alpha 4 and 8, 4 and 9",
        ),
    ],
    ids=str,
)
def test_configurations_that_are_refused(written, fields, message):
    change_config(written, **fields)
    with pytest.raises(UserError, match=message):
        read("k2_thinking", written)


STEM = "base_model.model.model.layers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{STEM}.2.self_attn.o_proj.lora_B.weight"),
            r"layers\.2\.self_attn\.o_proj\.lora_B\.weight: missing",
        ),
        (
            lambda t: t.pop(f"{STEM}.1.mlp.experts.7.up_proj.lora_A.weight"),
            r"layers\.1\.mlp\.experts\.7\.up_proj\.lora_A\.weight: missing",
        ),
        (
            lambda t: t.update({f"{STEM}.3.self_attn.o_proj.lora_B.weight": np.zeros(2)}),
            r"layers\.3\.self_attn\.o_proj\.lora_B\.weight: adapts nothing",
        ),
        (
            lambda t: t.update({f"{STEM}.1.mlp.gate.lora_A.weight": np.zeros((4, 64))}),
            r"mlp\.gate\.lora_A\.weight: adapts nothing",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.base_layer.weight": np.zeros((2, 2))}),
            "lm_head.base_layer.weight: a weight of the base.*save_embedding_layers=False",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 63), "f4")}),
            r"found shape \[4, 63\], required \[4, 64\]",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 64), "i4")}),
            "found dtype I32, required F32 or BF16 or F16",
        ),
        (
            lambda t: t.update(
                {
                    f"{STEM}.{n}.mlp.experts.lora_{x}.weight": np.zeros(
                        (16, 32) if x == "A" else (64, 16), "f4"
                    )
                    for n in (1, 2)
                    for x in "AB"
                }
            ),
            r"mlp\.experts\.down_proj: adapted expert by expert and fused",
        ),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_all_named(written, change, message):
    change_tensors(written, change)
    with pytest.raises(UserError, match=message):
        read("k2_thinking", written)


def test_an_adapter_of_another_base_is_refused():
    with pytest.raises(UserError, match=r"self_attn\.q_proj\.lora_A\.weight: adapts nothing"):
        read("k2_thinking", golden.GOLDEN / "adapters" / "moonlight")


def test_files_that_are_absent_are_named(tmp_path, written):
    with pytest.raises(MissingFileError, match="no such adapter directory"):
        read("k2_thinking", tmp_path / "nowhere")
    (written / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="one safetensors file"):
        read("k2_thinking", written)
    (written / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read("k2_thinking", written)
    (written / "adapter_config.json").unlink()
    with pytest.raises(MissingFileError, match="PEFT adapter directory"):
        read("k2_thinking", written)
