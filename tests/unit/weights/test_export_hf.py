"""Merged checkpoints: what changes, what keeps its bytes, what is reported and what is refused."""

import io
import json
import shutil
from collections import namedtuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from kimi_jax.config import LoraSection
from kimi_jax.errors import UserError
from kimi_jax.int4 import dequantise_numpy, unpack_numpy
from kimi_jax.lora import adapter_shapes, init_adapters, plan_adapters
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.transformer import ModelDef
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.export_hf import write_merged
from kimi_jax.weights.export_peft import peft_parameters
from kimi_jax.weights.load import load_base
from kimi_jax.weights.merge import LowRank, Survival, merge_bf16, merge_int4
from kimi_jax.weights.merge_report import MergeReport, ProjectionReport, print_report
from tests.unit import golden

FORMATS = [
    ("k2_thinking", "merged-int4"),
    ("k2_thinking", "merged-bf16"),
    ("k25", "merged-int4"),
    ("k25", "merged-bf16"),
    ("moonlight", "merged-bf16"),
]


def merge(out, checkpoint, plan, adapters, form, **options):
    """`write_merged`, its report, and what it printed."""
    console = Console(file=io.StringIO(), width=120)
    report = write_merged(out, checkpoint, plan, adapters, form, console, **options)
    return report, console.file.getvalue()


def files(directory):
    """Every file below a directory, by its relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def plan_and_zeros(name, targets=("routed",), **settings):
    plan = plan_adapters(
        LoraSection(rank=2, alpha=4.0, targets=targets, **settings), golden.checkpoint(name).table
    )
    return plan, {p: np.zeros(s, np.float32) for p, s in adapter_shapes(plan).items()}


def dense_weights(checkpoint):
    """Every weight of the text model as float32, int4 unpacked, by HF module name."""
    weights = {}
    for name, tensor in checkpoint.tensors.items():
        values = checkpoint.entries[name].read()
        module, _, suffix = name.rpartition(".")
        if tensor.part == "value":
            weights[module if suffix == "weight" else name] = values.astype(np.float32)
        elif tensor.part == "packed":
            scale = checkpoint.entries[f"{module}.weight_scale"].read()
            weights[module] = dequantise_numpy(unpack_numpy(values), scale).astype(np.float32)
    return weights


def changes(checkpoint, plan, adapters):
    """alpha / rank · B · A of every adapted module, from the factors under PEFT's names."""
    factors = peft_parameters(plan, checkpoint.config, adapters)
    scales = {a.weight.name: a.scale for a in plan.values()}
    result = {}
    for name in factors:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if not name.endswith("lora_A.weight"):
            continue
        plain = ".".join(p for p in module.split(".layers.")[-1].split(".") if not p.isdigit())
        b = factors[name.replace("lora_A", "lora_B")].astype(np.float64)
        scale = scales.get(plain, scales.get(plain.split(".")[-1]))
        result[module] = scale * (b @ factors[name].astype(np.float64))
    return result


@pytest.fixture
def copied(tmp_path):
    """A copy of the k2_thinking checkpoint, to be added to."""
    shutil.copytree(golden.checkpoint_directory("k2_thinking"), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", ["k2_thinking", "k25"])
def test_untouched_adapter_gives_back_every_byte(tmp_path, name):
    """B is zero, A is not: a sum that is requantised, or -0.0 that becomes 0.0, changes bytes."""
    checkpoint = golden.checkpoint(name)
    adapters = init_adapters(golden.plan(name), seed=0)
    report, text = merge(tmp_path / "out", checkpoint, golden.plan(name), adapters, "merged-int4")
    assert files(tmp_path / "out") == files(checkpoint.directory)
    assert all(p.changed == 0 for p in report.projections)
    assert "Warning" not in text


def test_untouched_adapter_in_bf16_gives_the_bytes_of_a_bf16_base(tmp_path):
    checkpoint = golden.checkpoint("moonlight")
    plan = golden.plan("moonlight")
    merge(tmp_path / "out", checkpoint, plan, init_adapters(plan, seed=0), "merged-bf16")
    assert files(tmp_path / "out") == files(checkpoint.directory)


@pytest.mark.parametrize(("name", "form"), FORMATS)
def test_merged_weights_are_base_plus_change(tmp_path, name, form):
    """Each value is within its format's rounding of W + alpha / r · B · A, computed in float64."""
    checkpoint, plan = golden.checkpoint(name), golden.plan(name)
    merge(tmp_path / "out", checkpoint, plan, golden.adapter(name), form)
    merged = open_checkpoint(tmp_path / "out")
    assert merged.config.packed_experts == (form == "merged-int4")
    before, after = dense_weights(checkpoint), dense_weights(merged)
    delta = changes(checkpoint, plan, golden.adapter(name))
    assert before.keys() == after.keys()
    assert len(delta) == sum(
        t.part in ("value", "packed") and t.weight.is_linear for t in checkpoint.tensors.values()
    )
    for module, weight in before.items():
        if module not in delta:
            np.testing.assert_array_equal(after[module], weight, err_msg=module)
            continue
        wanted = weight + delta[module]
        allowed = np.abs(wanted) * 2**-8 + 1e-6
        scale_name = f"{module}.weight_scale"
        if scale_name in merged.entries:
            scale = merged.entries[scale_name].read().astype(np.float32)
            allowed = 0.55 * np.repeat(scale, 32, axis=-1)
        assert (np.abs(after[module] - wanted) <= allowed).all(), module


def test_logits_of_a_merged_checkpoint_are_near_those_of_base_and_adapter(tmp_path):
    """The adapter moves the logits by 9; rounding the merged weights to bf16, by about 0.1."""
    merge(
        tmp_path / "out",
        golden.checkpoint("k2_thinking"),
        golden.plan("k2_thinking"),
        golden.adapter("k2_thinking"),
        "merged-bf16",
    )
    merged = open_checkpoint(tmp_path / "out")
    model = ModelDef(merged.config, settings=ModelSettings(dtype=jnp.float32))
    stored = golden.gradients("k2_thinking")
    logits = model.bind(load_base(merged), {})(jnp.asarray(stored["tokens"]))
    assert np.abs(logits - stored["logits"]).max() <= 0.5


def test_one_expert_is_touched_and_nothing_else(tmp_path):
    """Packed words and scales of that expert change; headers and all other bytes stay."""
    checkpoint = golden.checkpoint("k2_thinking")
    plan, adapters = plan_and_zeros("k2_thinking")
    rng = np.random.default_rng(0)
    path = "moe_layers.mlp.experts.down_proj"
    adapters[f"{path}.lora_A"] = rng.standard_normal(adapters[f"{path}.lora_A"].shape, np.float32)
    adapters[f"{path}.lora_B"][1, 5] = 0.01
    report, _ = merge(tmp_path / "out", checkpoint, plan, adapters, "merged-int4")
    merged = open_checkpoint(tmp_path / "out")
    changed = {
        name
        for name, entry in checkpoint.entries.items()
        if entry.read().tobytes() != merged.entries[name].read().tobytes()
    }
    stem = "model.layers.2.mlp.experts.5.down_proj"
    assert changed == {f"{stem}.weight_packed", f"{stem}.weight_scale"}
    assert {p.path: p.changed for p in report.projections if p.changed} == {path: 1}
    for name, entry in checkpoint.entries.items():
        assert merged.entries[name].offset == entry.offset


def test_words_and_scales_in_different_shards_come_of_one_rounding(copied, tmp_path):
    """Each shard has a job of its own for its part; in bf16 a shard of nothing but scales goes."""
    plan, adapters = golden.plan("k2_thinking"), golden.adapter("k2_thinking")
    merge(tmp_path / "together", open_checkpoint(copied), plan, adapters, "merged-int4")
    parts = {"rest.safetensors": {}, "scales.safetensors": {}}
    for path in sorted(copied.glob("*.safetensors")):
        for name, value in load_file(path).items():
            in_scales = name.endswith(("weight_scale", "weight_shape"))
            parts["scales.safetensors" if in_scales else "rest.safetensors"][name] = value
        path.unlink()
    for name, tensors in parts.items():
        save_file(tensors, copied / name, {"format": "pt"})
    weight_map = {name: shard for shard, tensors in parts.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))

    report, _ = merge(tmp_path / "apart", open_checkpoint(copied), plan, adapters, "merged-int4")
    together, apart = (open_checkpoint(tmp_path / d).entries for d in ("together", "apart"))
    for name, entry in together.items():
        assert apart[name].read().tobytes() == entry.read().tobytes(), name
    assert {p.changed for p in report.projections if ".experts." in p.path} == {16}

    merge(tmp_path / "bf16", open_checkpoint(copied), plan, adapters, "merged-bf16")
    open_checkpoint(tmp_path / "bf16")
    assert [p.name for p in (tmp_path / "bf16").glob("*.safetensors")] == ["rest.safetensors"]


def test_bf16_leaves_no_trace_of_quantisation(tmp_path):
    checkpoint = golden.checkpoint("k25")
    plan, adapters = plan_and_zeros("k25", targets=("head",))
    merge(tmp_path / "out", checkpoint, plan, adapters, "merged-bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "quantization_config" not in config["text_config"]
    source = json.loads((checkpoint.directory / "config.json").read_text())
    source["text_config"].pop("quantization_config")
    assert config == source
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    merged = open_checkpoint(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in merged.entries.values())
    assert not [name for name in merged.entries if ".weight_" in name]
    vision = [name for name in checkpoint.entries if name.startswith("vision_tower.")]
    assert vision
    for name in vision:
        assert merged.entries[name].read().tobytes() == checkpoint.entries[name].read().tobytes()


def test_other_files_are_copied_and_other_weights_are_not(copied, tmp_path):
    (copied / "tiktoken.model").write_bytes(b"\x00tokens")
    (copied / "docs").mkdir()
    (copied / "docs" / "guide.md").write_text("read me")
    (copied / ".cache").mkdir()
    (copied / ".cache" / "lock").write_text("")
    (copied / "model.safetensors").write_bytes(b"stale")
    (copied / "pytorch_model.bin").write_bytes(b"stale")
    plan, adapters = plan_and_zeros("k2_thinking")
    report, text = merge(tmp_path / "out", open_checkpoint(copied), plan, adapters, "merged-int4")
    expected = files(copied)
    for name in (".cache/lock", "model.safetensors", "pytorch_model.bin"):
        del expected[name]
    assert files(tmp_path / "out") == expected
    assert report.left_out == ("model.safetensors", "pytorch_model.bin")
    assert "pytorch_model.bin" in text


def test_a_checkpoint_of_one_file_has_no_index(copied, tmp_path):
    tensors = {}
    for path in sorted(copied.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (copied / "model.safetensors.index.json").unlink()
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    plan, adapters = golden.plan("k2_thinking"), golden.adapter("k2_thinking")
    for form in ("merged-int4", "merged-bf16"):
        merge(tmp_path / form, open_checkpoint(copied), plan, adapters, form)
        assert not list((tmp_path / form).glob("*.index.json"))
        open_checkpoint(tmp_path / form)


def test_shared_factors_are_merged_into_each_expert(tmp_path):
    checkpoint = golden.checkpoint("moonlight")
    plan, adapters = plan_and_zeros("moonlight", expert_factors="shared")
    rng = np.random.default_rng(3)
    adapters = {p: rng.standard_normal(v.shape).astype(np.float32) for p, v in adapters.items()}
    merge(tmp_path / "out", checkpoint, plan, adapters, "merged-bf16")
    before, after = dense_weights(checkpoint), dense_weights(open_checkpoint(tmp_path / "out"))
    for module, delta in changes(checkpoint, plan, adapters).items():
        wanted = before[module] + delta
        assert (np.abs(after[module] - wanted) <= np.abs(wanted) * 2**-8 + 1e-5).all(), module


def test_report_measures_what_survived(tmp_path):
    """A change of a tenth of the weights' size is partly lost in int4; a large one is not."""
    survived = {}
    for size in (0.001, 0.3):
        plan, adapters = plan_and_zeros("k2_thinking", targets=("mlp.experts.up_proj",))
        rng = np.random.default_rng(4)
        for path, value in adapters.items():
            adapters[path] = size**0.5 * rng.standard_normal(value.shape).astype(np.float32)
        report, text = merge(
            tmp_path / str(size), golden.checkpoint("k2_thinking"), plan, adapters, "merged-int4"
        )
        (projection,) = report.projections
        assert (projection.changed, projection.tensors) == (16, 16)
        survived[size] = projection.survival
        assert ("Warning" in text) == (projection in report.faint)
        assert "16 of 16" in text
    assert survived[0.001].projection < 0.5 < 0.95 < survived[0.3].projection
    assert survived[0.001].cosine < 0.7 < 0.9 < survived[0.3].cosine


def test_warning_names_the_projection_and_the_way_out():
    rows = (
        ProjectionReport("moe_layers.mlp.experts.up_proj", 3, 4, Survival(1.0, 0.04, 0.1)),
        ProjectionReport("moe_layers.self_attn.o_proj", 2, 2, Survival(1.0, 1.0, 1.0)),
        ProjectionReport("lm_head", 0, 1, Survival()),
    )
    console = Console(file=io.StringIO(), width=500)
    print_report(MergeReport(golden.GOLDEN, "merged-int4", 1, rows, ()), console)
    text = console.file.getvalue()
    warning = text[text.index("Warning") :]
    assert "experts.up_proj" in warning
    assert "o_proj" not in warning
    assert "lm_head" not in warning
    assert "merged-bf16" in warning
    assert "10.0%" in text
    assert "0.500" in text  # 0.1 / sqrt(1 · 0.04)


def test_arithmetic_of_one_weight():
    """Blocks of rows join without a seam, and zero change keeps the bits, -0.0 and code -8 included."""
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((7, 64)).astype(ml_dtypes.bfloat16)
    weight[0, :2] = -0.0
    adapter = LowRank(*(rng.standard_normal(s).astype(np.float32) for s in ((2, 64), (7, 2))), 0.5)
    adapter.b[0] = 0
    merged, survival = merge_bf16(weight, adapter)
    np.testing.assert_array_equal(merged[0].view(np.uint16), weight[0].view(np.uint16))
    wanted = weight.astype(np.float32) + 0.5 * adapter.b @ adapter.a
    np.testing.assert_allclose(merged.astype(np.float32), wanted, rtol=2**-8)
    delta = (0.5 * adapter.b @ adapter.a).astype(np.float64)
    realised = (merged.astype(np.float32) - weight.astype(np.float32)).astype(np.float64)
    assert survival.intended == pytest.approx((delta**2).sum(), rel=1e-5)
    assert survival.overlap == pytest.approx((delta * realised).sum(), rel=1e-5)
    assert survival.realised == pytest.approx((realised**2).sum(), rel=1e-5)

    words = rng.integers(-(2**31), 2**31, (7, 8)).astype(np.int32)
    scale = np.full((7, 2), 0.1, ml_dtypes.bfloat16)
    adapter.a[:, :32] = 0  # the first group of each row does not change
    new_words, new_scale, _ = merge_int4(words, scale, adapter)
    np.testing.assert_array_equal(new_words[:, :4], words[:, :4])
    np.testing.assert_array_equal(new_scale[:, 0], scale[:, 0])
    np.testing.assert_array_equal(new_words[0], words[0])
    assert (new_words[1:, 4:] != words[1:, 4:]).any()


def test_blocks_of_rows_join(monkeypatch):
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((10, 32)).astype(ml_dtypes.bfloat16)
    adapter = LowRank(*(rng.standard_normal(s).astype(np.float32) for s in ((2, 32), (10, 2))), 1.0)
    whole, survival = merge_bf16(weight, adapter)
    monkeypatch.setattr("kimi_jax.weights.merge._BLOCK", 96)
    parts, same = merge_bf16(weight, adapter)
    np.testing.assert_array_equal(parts, whole)
    assert same == pytest.approx(survival)


def refuse(out, checkpoint, form, message, value=0.0, targets=("routed",), **options):
    name = "k2_thinking" if checkpoint.config.packed_experts else "moonlight"
    plan, adapters = plan_and_zeros(name, targets)
    adapters = {path: np.full_like(array, value) for path, array in adapters.items()}
    with pytest.raises(UserError, match=message):
        merge(out, checkpoint, plan, adapters, form, **options)


def test_output_directories_that_are_refused(copied, tmp_path):
    checkpoint = open_checkpoint(copied)
    before = files(tmp_path)
    refuse(copied, checkpoint, "merged-bf16", "base: not empty")
    refuse(copied / "out", checkpoint, "merged-bf16", "lies inside the base's directory")
    refuse(copied / "config.json", checkpoint, "merged-int4", "is a file")
    (tmp_path / ".out.partial").mkdir()
    refuse(tmp_path / "out", checkpoint, "merged-int4", "or one that still runs")
    (tmp_path / ".out.partial").rmdir()
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_int4_of_a_bf16_base_is_refused(tmp_path):
    message = "not packed int4; use merged-bf16"
    refuse(tmp_path / "out", golden.checkpoint("moonlight"), "merged-int4", message)


def test_too_little_room_is_refused_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1000))
    message = r"the export takes [\d.e-]+ GB, and 1e-06 GB are free"
    refuse(tmp_path / "out", golden.checkpoint("moonlight"), "merged-bf16", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_refused(tmp_path, value):
    checkpoint = golden.checkpoint("moonlight")
    refuse(tmp_path / "out", checkpoint, "merged-bf16", r"gate_proj\.lora_A: holds NaN", value)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "form"), [FORMATS[0], FORMATS[1]])
def test_a_change_that_overflows_is_refused(tmp_path, name, form):
    checkpoint = golden.checkpoint(name)
    refuse(tmp_path / "out", checkpoint, form, "too large for the weight's format", 1e19)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "form"), FORMATS)
def test_a_change_that_rounding_wipes_out_is_refused(tmp_path, name, form):
    checkpoint = golden.checkpoint(name)
    plan, adapters = plan_and_zeros(name, targets=("attention", "head"))
    adapters = {path: np.full_like(array, 1e-12) for path, array in adapters.items()}
    with pytest.raises(UserError, match="leaves nothing of this adapter's change"):
        merge(tmp_path / "out", checkpoint, plan, adapters, form)
    assert not list(tmp_path.iterdir())


def test_nothing_stands_at_the_destination_until_all_is_written(tmp_path):
    checkpoint = golden.checkpoint("k2_thinking")
    plan, adapters = golden.plan("k2_thinking"), golden.adapter("k2_thinking")
    seen = []

    def progress(done, total):
        assert not (tmp_path / "out").exists()
        seen.append((done, total))
        if len(seen) == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", checkpoint, plan, adapters, "merged-int4", progress=progress)
    assert not list(tmp_path.iterdir())
    assert 0 < seen[0][0] < seen[0][1]
