"""Layout as data: which dimension goes to which mesh axis, and what cannot be spread."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from kimi_jax import UserError
from kimi_jax.config import LoraSection, MeshSection
from kimi_jax.lora import plan_adapters
from kimi_jax.model.layout import adapter_specs, base_arrays, check_layout
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import Ranks, make_ranks
from kimi_jax.parallel.sharding import local_shape, partition
from kimi_jax.weights.checkpoint import open_checkpoint, resolve_checkpoint

ALL = ("attention", "dense", "shared", "routed", "head")


@pytest.fixture(scope="module")
def table():
    """The weights of the demo: 16 experts, a vocabulary of 1,280."""
    return open_checkpoint(resolve_checkpoint("demo")).table


def test_partition_follows_letters():
    assert partition("E M D") == P("expert", None, None)
    assert partition("V D") == P("expert", None)
    assert partition("N*H+R Q") == P(None, None)
    assert partition("N*H+R Q", {"H": "data"}) == P("data", None)
    assert partition("N*H+R Q", rows="expert") == P("expert", None)


@pytest.mark.parametrize(
    ("axes", "rules", "complaint"),
    [
        ("E M D", {"E": "expert", "D": "expert"}, "'expert' is given to 2 dimensions of 'E M D'"),
        ("N*H+R Q", {"N": "expert", "H": "data"}, "is given ['data', 'expert']: one only"),
        ("E M", {"E": "expert", "Z": "data"}, "not axes: Z"),
    ],
)
def test_partition_refuses_collisions(axes, rules, complaint):
    with pytest.raises(UserError) as refusal:
        partition(axes, rules)
    assert complaint in str(refusal.value)


def test_local_shape_refuses_uneven_parts():
    assert local_shape("w", (16, 6), P("expert", None), {"expert": 8}) == (2, 6)
    assert local_shape("rows", (3, 16), P(None, ("data", "expert")), {"data": 2, "expert": 4}) == (
        3,
        2,
    )
    with pytest.raises(UserError, match=r"w: 12 cannot be divided over mesh.expert = 8"):
        local_shape("w", (12, 6), P("expert", None), {"expert": 8})


def test_mesh_is_refused_with_the_arithmetic():
    with pytest.raises(UserError, match=r"2 × 8 = 16 devices are asked for; found 8"):
        make_mesh(expert=8, data=2)
    assert make_mesh(expert=4, data=2).shape == {"data": 2, "expert": 4}


def test_neighbours_share_the_experts():
    """Devices of one node are neighbours in JAX's order; experts' rows must not cross nodes."""
    grid = make_mesh(expert=4, data=2).devices
    assert [d.id for d in grid[0]] == [0, 1, 2, 3]


def test_layout_is_refused_if_it_does_not_divide(table):
    ranks = Ranks(expert=3, alone=True)
    with pytest.raises(UserError) as refusal:
        check_layout(table, ranks)
    message = str(refusal.value)
    assert "16 routed experts cannot be divided evenly: 16 / 3 = 5.33" in message
    assert "1280 rows of the vocabulary" in message


@pytest.mark.parametrize("rest", ["sharded", "replicated"])
def test_only_named_arrays_are_whole_everywhere(table, rest):
    """Routers' experts are no places of experts: every rank routes among all of them."""
    arrays = base_arrays(table, Ranks(expert=8, alone=True, rest=rest))
    spread = {path for path, array in arrays.items() if "expert" in array.spec}
    named = {p for p in arrays if p.startswith(("embed_tokens", "lm_head")) or ".experts." in p}
    bias = "moe_layers.mlp.gate.e_score_correction_bias"
    if rest == "replicated":
        assert spread == named
    else:
        whole = {path for path in arrays if "norm" in path} | {bias}
        assert spread == arrays.keys() - whole


def test_adapters_live_with_their_experts(table):
    shared = LoraSection(rank=2, alpha=4, targets=ALL, expert_factors="shared")
    specs = adapter_specs(plan_adapters(shared, table))
    experts = "moe_layers.mlp.experts"
    assert specs[f"{experts}.gate_proj.lora_A"] == P(None, None, None)  # one for all experts
    assert specs[f"{experts}.gate_proj.lora_B"] == P(None, "expert", None, None)
    assert specs[f"{experts}.down_proj.lora_A"] == P(None, "expert", None, None)
    assert specs[f"{experts}.down_proj.lora_B"] == P(None, None, None)
    assert specs["lm_head.lora_A"] == P(None, None)
    assert specs["lm_head.lora_B"] == P("expert", None)
    assert specs["moe_layers.self_attn.q_a_proj.lora_B"] == P(None, None, None)


def test_one_device_needs_no_mesh():
    assert make_ranks(MeshSection()).mesh is None
    assert make_ranks(MeshSection(expert=2)).mesh.devices.size == 2
    assert len(jax.devices()) == 8
