"""Which weights are adapted, the shapes of their factors, and their initial values."""

import numpy as np
import pytest

from kimi_jax.config import LoraSection
from kimi_jax.errors import UserError
from kimi_jax.lora import adapter_shapes, init_adapters, plan_adapters
from tests.unit import golden

ATTENTION = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


def settings(*targets, **changes):
    return LoraSection(**{"rank": 4, "alpha": 8.0, "targets": targets} | changes)


def resolve(*targets, name="k2_thinking", **changes):
    return plan_adapters(settings(*targets, **changes), golden.checkpoint(name).table)


def paths(stack, block, names):
    return {f"{stack}.{block}.{name}" for name in names}


DENSE = paths("dense_layers", "mlp", PROJECTIONS)
SHARED = paths("moe_layers", "mlp.shared_experts", PROJECTIONS)
ROUTED = paths("moe_layers", "mlp.experts", PROJECTIONS)
ALL_ATTENTION = paths("dense_layers", "self_attn", ATTENTION) | paths(
    "moe_layers", "self_attn", ATTENTION
)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attention"], ALL_ATTENTION),
        (["dense"], DENSE),
        (["shared"], SHARED),
        (["routed"], ROUTED),
        (["head"], {"lm_head"}),
        (["lm_head"], {"lm_head"}),
        (["o_proj"], {"dense_layers.self_attn.o_proj", "moe_layers.self_attn.o_proj"}),
        (["self_attn.q_a_proj"], {f"{s}_layers.self_attn.q_a_proj" for s in ("dense", "moe")}),
        (["mlp.experts.down_proj"], {"moe_layers.mlp.experts.down_proj"}),
        (["gate_proj"], {p for p in DENSE | SHARED | ROUTED if p.endswith("gate_proj")}),
        (["mlp.*_proj"], DENSE | SHARED | ROUTED),
        (["mlp.shared_experts.*"], SHARED),
        (["*"], ALL_ATTENTION | DENSE | SHARED | ROUTED | {"lm_head"}),
        (["dense", "routed", "dense"], DENSE | ROUTED),
    ],
)
def test_targets(targets, expected):
    """Routers, norms and the embedding stay frozen even under `*`."""
    assert set(resolve(*targets)) == expected


def test_plain_queries():
    """Moonlight has q_proj, and no latent of queries."""
    assert {p.rsplit(".", 1)[-1] for p in resolve("attention", name="moonlight")} == {
        "q_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
    }


def test_plan_is_in_the_order_of_the_table():
    """The order of `targets` must not decide the order of parameters."""
    assert list(resolve("routed", "attention")) == list(resolve("attention", "routed"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_proj", "'q_proj' matches no weight of this checkpoint; did you mean 'q_"),
        ("attenton", "did you mean 'attention'?"),
        ("experts.down_proj", "did you mean 'mlp.experts.down_proj'?"),
        ("zzz", "matches no weight of this checkpoint; known: attention, dense"),
        ("router", "'router' matches only mlp.gate.e_score_correction_bias, mlp.gate.weight"),
        ("norm", "stay frozen"),
        ("embed_tokens", "'embed_tokens' matches only embed_tokens"),
        ("*layernorm", "input_layernorm"),
    ],
)
def test_target_that_adapts_nothing(target, message):
    with pytest.raises(UserError) as caught:
        resolve(target)
    assert str(caught.value).startswith("lora.targets: nothing to adapt\n")
    assert message in str(caught.value)


def test_role_that_a_checkpoint_lacks_is_not_suggested():
    table = [w for w in golden.checkpoint("k2_thinking").table if w.role != "dense"]
    with pytest.raises(UserError, match="'dense' matches no weight") as caught:
        plan_adapters(settings("dense"), table)
    assert "known: attention, down_proj" in str(caught.value)


def test_all_bad_targets_are_listed():
    with pytest.raises(UserError) as caught:
        resolve("attention", "q_proj", "norm", "zzz")
    assert len(str(caught.value).splitlines()) == 4


def test_shapes_are_those_of_peft():
    """A [r, in], B [out, r], experts and layers in front; routed experts have a rank of their own."""
    shapes = adapter_shapes(resolve("*", expert_rank=2))
    assert shapes["lm_head.lora_A"] == (4, 64)
    assert shapes["lm_head.lora_B"] == (128, 4)
    assert shapes["dense_layers.mlp.down_proj.lora_A"] == (1, 4, 80)
    assert shapes["moe_layers.self_attn.q_b_proj.lora_B"] == (2, 128, 4)
    assert shapes["moe_layers.mlp.experts.gate_proj.lora_A"] == (2, 8, 2, 64)
    assert shapes["moe_layers.mlp.experts.gate_proj.lora_B"] == (2, 8, 32, 2)
    assert shapes["moe_layers.mlp.experts.down_proj.lora_A"] == (2, 8, 2, 32)


def test_shared_factor_is_the_one_on_the_hidden_side():
    shapes = adapter_shapes(resolve("routed", "shared", expert_factors="shared"))
    for name in ("gate_proj", "up_proj"):
        assert shapes[f"moe_layers.mlp.experts.{name}.lora_A"] == (2, 4, 64)
        assert shapes[f"moe_layers.mlp.experts.{name}.lora_B"] == (2, 8, 32, 4)
    assert shapes["moe_layers.mlp.experts.down_proj.lora_A"] == (2, 8, 4, 32)
    assert shapes["moe_layers.mlp.experts.down_proj.lora_B"] == (2, 64, 4)
    # Only routed experts share; a shared expert is a layer like any other.
    assert shapes["moe_layers.mlp.shared_experts.gate_proj.lora_A"] == (2, 4, 64)


@pytest.mark.parametrize(
    ("changes", "rank", "alpha", "scale"),
    [
        ({}, 4, 8.0, 2.0),
        ({"expert_rank": 2}, 2, 4.0, 2.0),  # the ratio stays
        ({"expert_alpha": 6.0}, 4, 6.0, 1.5),
        ({"expert_rank": 2, "expert_alpha": 6.0}, 2, 6.0, 3.0),
    ],
)
def test_rank_and_alpha_of_routed_experts(changes, rank, alpha, scale):
    plan = resolve("routed", "head", **changes)
    routed = plan["moe_layers.mlp.experts.up_proj"]
    assert (routed.rank, routed.alpha, routed.scale) == (rank, alpha, scale)
    assert (plan["lm_head"].rank, plan["lm_head"].scale) == (4, 2.0)


def test_parameters_count_every_layer_and_expert():
    plan = resolve("mlp.experts.down_proj", expert_rank=2)
    assert plan["moe_layers.mlp.experts.down_proj"].parameters == 2 * 8 * 2 * (32 + 64)


def test_initial_values():
    """A uniform in ±1/√in as PEFT draws it, B zero; fp32 and not constant anywhere."""
    factors = init_adapters(resolve("*"), seed=0)
    for path, values in factors.items():
        drawn = np.asarray(values)
        assert drawn.dtype == np.float32
        if path.endswith("lora_B"):
            assert not drawn.any()
            continue
        bound = drawn.shape[-1] ** -0.5
        assert 0.9 * bound < np.abs(drawn).max() <= bound
        assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.15)
        matrices = drawn.reshape(-1, *drawn.shape[-2:])
        assert len({m.tobytes() for m in matrices}) == len(matrices), path


def test_initial_values_depend_on_seed_and_path_alone():
    """Another target more or less changes no other's draw, nor does the order of targets."""
    all_of_them = init_adapters(resolve("*"), seed=3)
    some = init_adapters(resolve("routed", "kv_b_proj"), seed=3)
    assert some
    for path, values in some.items():
        assert np.asarray(values).tobytes() == np.asarray(all_of_them[path]).tobytes(), path
    other = init_adapters(resolve("kv_b_proj"), seed=4)
    path = "dense_layers.self_attn.kv_b_proj.lora_A"
    assert np.asarray(other[path]).tobytes() != np.asarray(some[path]).tobytes()
    # The same shape under another path has other values.
    up, gate = (all_of_them[f"dense_layers.mlp.{n}_proj.lora_A"] for n in ("up", "gate"))
    assert np.asarray(up).tobytes() != np.asarray(gate).tobytes()
