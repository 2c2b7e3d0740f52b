"""The plan of a full-size run: what it adds up to, and how it answers to a changed run."""

import json

import pytest

from kimi_jax.config_file import load_config
from kimi_jax.errors import UserError
from kimi_jax.model.params import weight_table
from kimi_jax.planning import plan
from kimi_jax.planning.flops import token_flops
from kimi_jax.planning.gpus import find_gpu
from kimi_jax.planning.memory import sizing_of
from kimi_jax.planning.options import options
from tests.unit.planning.conftest import ARCHITECTURE, RECIPE

GIB = 2**30


def items(found):
    return {item.name: item.bytes for item in found.items}


def test_full_size_on_eight(on_eight):
    found = plan(on_eight())
    assert found.devices == 8
    assert found.tokens_per_device == 8192
    assert found.fits
    assert found.program / GIB < 130
    sizes = items(found)
    assert sizes["gradients"] == sizes["adapters of experts"] + sizes["other adapters"]
    assert sizes["optimizer moments"] == 2 * sizes["gradients"]
    # 61 inputs of 8,192 tokens in bf16; which 8 experts each of 60 layers chose, int32, and their logits;
    # the order of all ranks' assignments and its inverse; one number a token of each of 4 norms; what 8
    # adapters of rank 8 in each layer make of the tokens, and 3 of the experts' buffer of 1.5 times the
    # mean rank's assignments.
    chosen, order = 60 * 8192 * 8 * (4 + 4), 2 * 60 * 65536 * 8 * 4
    low_rank = 61 * 8 * 8 * 8192 * 2 + 60 * 3 * 8 * (65536 * 3 // 2) * 2
    few = chosen + order + 61 * 4 * 8192 * 4 + low_rank
    assert sizes["saved activations"] == 61 * 8192 * 7168 * 2 + few
    assert found.total == sum(sizes.values())
    assert found.program == found.total - sizes["reserve"]


# What the compiler counted for this step on eight H200: arguments, results beside them, temporaries.
# `python -m kimi_jax.plan --config configs/k2_thinking_8xh200.yaml --compile` counts again.
COMPILED = 98.0 * GIB


def test_plan_against_the_compiler(on_eight):
    assert plan(on_eight()).program == pytest.approx(COMPILED, rel=0.10)


def test_plan_of_the_recipe_against_the_compiler():
    """126.4 GiB, compiled for eight absent H200; four H200 with as many experts each had 127.7."""
    recipe = load_config(RECIPE, [f"model.checkpoint={ARCHITECTURE}"])
    assert plan(recipe).program == pytest.approx(126.4 * GIB, rel=0.10)


def test_parameters(on_eight):
    found = plan(on_eight()).parameters
    assert found.total == 1_026_408_232_448
    assert found.active / 1e9 == pytest.approx(31.7, abs=0.05)
    experts = 60 * 384 * 3 * (7168 + 2048) * 8
    assert 0 < found.trained - experts < 0.05 * experts


def test_work_of_a_token(model):
    flops = token_flops(weight_table(model), model, "layer", 2048)
    assert flops.frozen / 1e9 == pytest.approx(127, abs=0.5)
    # All but down projections and head: 2 · (31.7 - 1.2 - 8.1) G.
    assert (flops.recomputed - flops.frozen) / 1e9 == pytest.approx(44.9, abs=0.5)
    assert flops.attention / 1e9 == pytest.approx(2.6, abs=0.05)
    none = token_flops(weight_table(model), model, "none", 2048)
    assert none.recomputed == none.frozen
    kept = token_flops(weight_table(model), model, "layer", 2048, ["expert_gate", "stream"])
    spared = 2 * (8 * 60 * 7168 * 2048 + 61 * 7168 * 64 * 128)
    assert flops.recomputed - kept.recomputed == spared
    kept = token_flops(weight_table(model), model, "layer", 2048, ["queries", "keys_values"])
    assert flops.recomputed - kept.recomputed == 2 * 61 * 64 * (1536 * 192 + 512 * 256)


@pytest.mark.parametrize(
    ("override", "grows", "shrinks"),
    [
        ("train.micro_batch=64", {"saved activations", "workspace"}, set()),
        ("lora.rank=16", {"adapters of experts", "gradients", "optimizer moments"}, set()),
        ("mesh.rest=replicated", {"other weights"}, set()),
        ("mesh.expert_buffer=3", {"workspace"}, set()),
        ("train.recompute=none", {"saved activations"}, set()),
        ("train.keep=[stream, expert_up]", {"saved activations"}, set()),
        ("train.offload=[stream, expert_up]", {"workspace"}, set()),
        ("lora.targets=[attention]", set(), {"adapters of experts", "gradients"}),
    ],
)
def test_what_a_setting_changes(on_eight, override, grows, shrinks):
    before, after = items(plan(on_eight())), items(plan(on_eight(override)))
    assert {name for name in grows if not after[name] > before[name]} == set()
    assert {name for name in shrinks if not after[name] < before[name]} == set()
    assert before["packed experts"] == after["packed experts"]


def test_what_the_machine_holds(on_eight):
    """As much as the device would: 8,192 tokens, 64 heads of 192 columns and of 128 and a number."""
    plain, found = plan(on_eight()), plan(on_eight("train.offload=[queries, attention]"))
    sizes = {"queries": 192 * 2, "attention": 128 * 2 + 4}
    assert found.offloaded == {name: 61 * 8192 * 64 * size for name, size in sizes.items()}
    assert found.to_json()["offloaded"] == found.offloaded
    grown = {name: size - items(plain)[name] for name, size in items(found).items()}
    # On the device: a layer's that is used, and the next one's.
    assert grown.pop("workspace") == 2 * found.host // 61
    assert set(grown.values()) == {0}
    assert plain.offloaded == {}
    kept = items(plan(on_eight("train.keep=[queries, attention]")))["saved activations"]
    assert kept - items(plain)["saved activations"] == found.host


def test_largest_micro_batch_is_the_largest(on_eight):
    largest = plan(on_eight()).largest_micro_batch
    assert largest > 32
    assert plan(on_eight(f"train.micro_batch={largest}")).fits
    assert not plan(on_eight(f"train.micro_batch={largest + 8}")).fits


def test_nothing_fits_where_the_weights_do_not(on_eight):
    found = plan(on_eight(), device="H100")
    assert not found.fits
    assert found.largest_micro_batch == 0


def test_other_numbers_of_devices(on_eight, model):
    sixteen = plan(on_eight(), devices=16)
    assert (sixteen.devices, sixteen.tokens_per_device) == (16, 8192)
    assert items(sixteen)["packed experts"] == items(plan(on_eight()))["packed experts"] // 2
    with pytest.raises(UserError, match=r"384 / 7 = 54\.86"):
        plan(on_eight(), devices=7)
    with pytest.raises(UserError, match="at least 1"):
        plan(on_eight(), devices=0)
    found = {(o.device, o.devices): o for o in options(on_eight(), model)}
    assert found["H200", 8].fits
    assert not found["H200", 4].fits
    assert found["H100", 16].machines == 2


def test_replicas_hold_the_same(on_eight):
    one, two = plan(on_eight()), plan(on_eight("mesh.data=2", "train.micro_batch=64"))
    assert two.devices == 16
    assert items(one) == items(two)


def test_devices_by_name_and_size():
    assert find_gpu("h200") is find_gpu("NVIDIA H200")
    assert find_gpu("96GB").memory == 96 * 10**9
    assert find_gpu("1.5 GiB").memory == 3 * 2**29
    with pytest.raises(UserError, match="'H201' is not known; required: one of H200, "):
        find_gpu("H201")


def test_json_and_figure(on_eight, tmp_path):
    found = plan(on_eight())
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["total"] == found.total
    assert content["items"][0]["name"] == "packed experts"
    figure = found.figure()
    figure.savefig(tmp_path / "plan.png")
    widths = sum(bar.get_width() for bar in figure.axes[0].containers[0][:1])
    assert widths == pytest.approx(content["items"][0]["bytes"] / GIB)


def test_one_device_has_no_exchange(model, on_eight):
    """The demo's mesh: nothing is gathered, so a buffer holds every assignment."""
    sizing = sizing_of(on_eight("mesh.expert=1", "train.micro_batch=1"), model)
    assert sizing.work.buffer == 2048 * 8
