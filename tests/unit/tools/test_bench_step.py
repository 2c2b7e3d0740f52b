"""`tools/bench_step.py`: attribution of kernels, floors, exchanges on paper, and a whole run on the CPU."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from kimi_jax.config_file import load_config
from kimi_jax.model.config import load_model_config
from kimi_jax.parallel.sharding import local_shape
from kimi_jax.planning.arrays import ADAPTERS, adapter_bytes
from kimi_jax.training.step import make_gradients
from tests.unit.support import tiny_run, write_tiny_checkpoint
from tools import bench_step
from tools.step_bench import cases, measuring, parts
from tools.step_bench.exchange import Exchange, project, traffic
from tools.step_bench.floors import Rates, Work, floors, total
from tools.step_bench.loads import loads
from tools.step_bench.machine import Startup
from tools.step_bench.parts import BACKWARD, FORWARD, ONCE, RECOMPUTED, part, phase
from tools.step_bench.program import Origin, by_kernel, origins
from tools.step_bench.rank import make_rank, make_state, with_rows
from tools.step_bench.trace import LISTED, Event, break_down

ROOT = Path(__file__).parents[3]
LOOP = "jit(step)/while/body/eval_jaxpr/"
AHEAD = LOOP + "jvp()/while/body/eval_jaxpr/"
BACK = LOOP + "transpose(jvp())/while/body/eval_jaxpr/checkpoint/"

PROGRAM = f"""HloModule jit_step, is_scheduled=true

FileNames
1 "kimi_jax/model/attention.py"
2 "kimi_jax/model/layers.py"
3 "kimi_jax/parallel/ranks.py"

FunctionNames
1 "LatentAttention.__call__"
2 "Linear.__call__"
3 "Ranks.gather"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=7 end_line=7 column=0 end_column=0}}
2 {{file_name_id=2 function_name_id=2 line=8 end_line=8 column=0 end_column=0}}
3 {{file_name_id=3 function_name_id=3 line=9 end_line=9 column=0 end_column=0}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}

ENTRY %main (p: f32[2]) -> f32[2] {{
  %custom-call.1 = (f32[2]{{0}}, s8[4]{{0}}) custom-call(%p), custom_call_target="__cublas$lt$matmul", \
metadata={{op_name="{AHEAD}dot_general" stack_frame_id=2}}
  %loop_broadcast_fusion.13 = bf16[2]{{0}} fusion(%p), metadata={{op_name="{AHEAD}tile" stack_frame_id=3}}
  ROOT %mpmd_map.5 = bf16[2]{{0}} custom-call(%p), custom_call_target="mosaic_gpu_v2", \
metadata={{op_name="{BACK}grouped_int4_input_gradient/mpmd_map"}}
}}
"""


def test_frames_lead_from_the_innermost_function_outwards():
    """The printed parent is one more than its number: read as it stands, every frame is its own."""
    known = origins(PROGRAM)
    names = [function for _, function in known["loop_broadcast_fusion.13"].frames]
    assert names == ["Ranks.gather", "Linear.__call__", "LatentAttention.__call__"]
    assert known["custom-call.1"].target == "__cublas$lt$matmul"
    assert by_kernel(known)["loop_broadcast_fusion_13"] == known["loop_broadcast_fusion.13"]


def test_a_step_is_cut_into_parts_that_add_up():
    """Guards against counting twice what runs side by side, and against losing idle time."""
    events = [
        Event("nvjet_sm90", 10.0, 2.0, "custom-call.1"),
        Event("loop_broadcast_fusion_13", 11.0, 3.0, "command_buffer_7"),  # by its kernel's name
        Event("grouped_int4_input_gradient_mosaic_gpu_kernel", 15.0, 1.0, "mpmd_map.5"),
        Event("nobody_knows", 16.0, 0.5),
        Event("MemcpyD2D", 15.25, 0.25, "", BACK + "jit(dynamic_index_in_dim)"),  # within another
    ]
    found = break_down(reversed(events), PROGRAM)
    assert found.parts == {
        (parts.PROJECTIONS, FORWARD): 2.0,
        (parts.EXCHANGES, FORWARD): 2.0,
        (parts.EXPERTS, BACKWARD): 1.0,
        (parts.REST_STACKS, BACKWARD): 0.0,
        (parts.UNKNOWN, ONCE): 0.5,
        (parts.IDLE, ONCE): 1.0,
    }
    assert found.span == sum(found.parts.values()) == 6.5
    assert found.of(parts.EXCHANGES) == 2.0
    assert {row["kernel"]: row["calls"] for row in found.longest}["nobody_knows"] == 1


def test_every_part_shows_its_longest_kernels():
    """A part that is larger than expected can be explained, however small it is in the whole."""
    many = [Event(f"nvjet_{n}", 10.0 * n, 9.0, "custom-call.1") for n in range(LISTED + 5)]
    few = [Event(f"unknown_{n}", 500.0 + n, 0.5 - 0.01 * n) for n in range(2)]
    listed = [row["kernel"] for row in break_down([*many, *few], PROGRAM).longest]
    assert listed[LISTED:] == ["unknown_0", "unknown_1"]
    small = [Event(f"nvjet_{n}", 1000.0 + n, 0.1, "custom-call.1") for n in range(20, 40)]
    own = Event("grouped_int4_input_gradient_mosaic_gpu_kernel", 2000.0, 0.05, "mpmd_map.5")
    rows = break_down([*many, *small, own], PROGRAM).longest
    assert [row["part"] for row in rows].count(parts.PROJECTIONS) == LISTED
    assert rows[-1]["part"] == parts.EXPERTS


@pytest.mark.parametrize(
    ("operation", "functions", "kernel", "wanted"),
    [
        (BACK + "rematted_computation/sin", ["rotate"], "f", (parts.REST_ATTENTION, RECOMPUTED)),
        (BACK + "td,ed->te/dot_general", ["Router.__call__"], "gemm_x", (parts.ROUTER, BACKWARD)),
        (BACK + "jvp(jit(project))/grouped_project/mpmd_map", [], "grouped_project_mosaic_gpu_kernel",
         (parts.EXPERT_LORA, RECOMPUTED)),
        (BACK + "transpose(jvp(jit(multiply)))/reshape", ["routed"], "loop", (parts.REST_EXPERTS, BACKWARD)),
        (BACK + "transpose(jvp())/sum_rows/mpmd_map", ["routed"], "sum_rows_mosaic_gpu_kernel",
         (parts.MOVEMENT, BACKWARD)),
        (AHEAD + "add", ["Layer.__call__", "Transformer.hidden"], "loop_add", (parts.REST_NORMS, FORWARD)),
        (AHEAD + "mul", ["SwiGlu.__call__"], "loop_mul", (parts.REST_DENSE, FORWARD)),
        (AHEAD + "dot_general", ["_product", "SwiGlu.__call__"], "gemm_fusion_dot_1", (parts.DENSE, FORWARD)),
        ("jit(step)/mul", [], "loop_mul", (parts.OPTIMIZER, ONCE)),
        # Scopes go before functions, inner before outer; a kernel's own name before both.
        (AHEAD + "attention/adapter/dot_general", ["Router.__call__"], "gemm", (parts.LORA, FORWARD)),
        (AHEAD + "experts/adapter/dot", [], "gemm", (parts.EXPERT_LORA, FORWARD)),
        (AHEAD + "swiglu/exchange/tile", [], "loop", (parts.EXCHANGES, FORWARD)),
        (AHEAD + "attention/packed_attention_forward/mpmd_map", [], "packed_mosaic_gpu_kernel",
         (parts.ATTENTION, FORWARD)),
        ("jit(step)/transpose(jvp(cross_entropy))/inner/mul", [], "loop", (parts.HEAD, BACKWARD)),
    ],
)  # fmt: skip
def test_parts_and_phases(operation, functions, kernel, wanted):
    origin = Origin(operation, tuple(("file.py", name) for name in functions))
    assert (part(origin, kernel), phase(operation)) == wanted


def scoped_loss(weights, x):
    """Layers under `checkpoint` in a scan, as the model's, with scopes."""

    def layer(x, weight):
        with jax.named_scope("attention"), jax.named_scope("adapter"):
            x = jnp.tanh(x @ weight)
        with jax.named_scope("experts"):
            return jnp.sin(x), None

    return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)[0].sum()


def test_paths_and_frames_as_the_installed_compiler_writes_them():
    """An upgrade that renames paths, or prints frames otherwise, would empty the breakdown."""
    lowered = jax.jit(jax.grad(scoped_loss)).lower(jnp.ones((3, 8, 8)), jnp.ones((8, 8)))
    known = origins(lowered.compile().as_text()).values()
    found = {(part(origin, "gemm"), phase(origin.operation)) for origin in known}
    for name in (parts.LORA, parts.EXPERTS):
        assert {(name, FORWARD), (name, RECOMPUTED), (name, BACKWARD)} & found
    assert (parts.LORA, BACKWARD) in found
    functions = {function for origin in known for _, function in origin.frames}
    assert any("scoped_loss" in function for function in functions)


@pytest.fixture(scope="module")
def on_eight():
    config = load_config(
        ROOT / "configs" / "k2_thinking_8xh200.yaml",
        [f"model.checkpoint={ROOT / 'configs' / 'k2_thinking'}", "train.micro_batch=32"],
    )
    return make_rank(config, load_model_config(config.model.checkpoint))


def test_floors(on_eight):
    """By hand, from K2's own sizes: a wrong factor here would make a slow part look done."""
    received = 60 * 65536
    work = Work(on_eight.model, on_eight.table, 8, 8192, 4 * 2048**2, received, 2, 8, 10**9)
    found = floors(work, Rates(1e12, 1e9, 1e12, 0.5e12))
    expert = 3 * 7168 * 2048
    assert found[parts.EXPERTS, FORWARD].seconds == pytest.approx(2 * received * expert / 1e12)
    assert found[parts.EXPERTS, RECOMPUTED].seconds == pytest.approx(
        2 / 3 * found[parts.EXPERTS, FORWARD].seconds
    )
    causal = 61 * 64 * (192 + 128) * 4 * 2048**2 / 1e12
    assert found[parts.ATTENTION, FORWARD].seconds == pytest.approx(causal)
    assert found[parts.ATTENTION, BACKWARD].seconds == pytest.approx(3.5 * causal / 0.5 - causal)
    head = 4 * 8192 * 163840 * 7168 / 1e12
    assert found[parts.HEAD, FORWARD].seconds == pytest.approx(head)
    assert found[parts.OPTIMIZER, ONCE].seconds == pytest.approx(7 * 4 * 1e9 / 1e9)
    attention = 101_122_048 * 61
    assert found[parts.PROJECTIONS, BACKWARD].seconds == pytest.approx(
        2 * 8192 * attention / 1e12, rel=1e-3
    )
    # Of 8 experts a token, one in eight is here: 1 - (7/8)^8 of the rows are read.
    rows = 60 * 65536 * (1 - (7 / 8) ** 8) + received
    assert found[parts.MOVEMENT, RECOMPUTED].seconds == pytest.approx(rows * 7168 * 2 / 1e9)
    again = [key for key in found if key[1] == RECOMPUTED]
    spared = sum(found[key].seconds for key in again)
    assert total(found, again) == pytest.approx(total(found) + spared)


def test_exchanges_are_those_of_the_compiled_program(on_eight):
    """What XLA's program for eight H200 gathers and sums (LOG.md): 207 GB and 14.5 GB a device."""
    model, table = on_eight.model, on_eight.table
    replicated = adapter_bytes(on_eight.model_def.plan, on_eight.ranks)[ADAPTERS]
    found = traffic(model, table, on_eight.ranks, "layer", 8192, 2, replicated)
    sizes = Counter()
    for one in found.exchanges:
        sizes[one.kind] += one.runs * one.size
    assert sizes["gather"] / 1e9 == pytest.approx(207, rel=0.01)
    assert sizes["scatter"] / 8 / 1e9 == pytest.approx(14.5, rel=0.02)
    assert found.seconds(243e9, 240e9) == pytest.approx(
        sizes["gather"] * 7 / 8 / 243e9
        + (sizes["scatter"] + 2 * sizes["all-reduce"]) * 7 / 8 / 240e9
    )
    less = traffic(model, table, on_eight.ranks, "none", 8192, 2, replicated)
    assert less.received("gather") < found.received("gather")
    assert Exchange("", "all-reduce", 1, 8).received(2) == 8


def test_projection_replaces_the_stand_ins():
    assert project(3.0, 0.5, 1.0) == (2.5, 3.5, 2.5)
    assert project(1.0, 0.5, 2.0).hidden == 2.0


def test_packed_rows_are_documents_side_by_side(on_eight):
    case = cases.make_case(on_eight, "packed")
    ids, weights = case.batch["segment_ids"], case.batch["loss_weights"]
    assert ids.shape == (1, 4, 2048)
    assert case.real_tokens == sum(case.documents) == (ids > 0).sum() < ids.size
    assert len(case.documents) > 4
    assert max(case.documents) <= 2048
    assert not weights[ids == 0].any()
    assert (weights.sum() + len(case.documents)) == case.real_tokens
    longer = with_rows(on_eight.config, 32768, 8192)
    assert (longer.train.micro_batch, longer.train.sequence_length) == (8, 32768)
    assert (on_eight.config.mesh.half_batches, longer.mesh.half_batches) == (2, 1)


def test_skewed_routing_treats_all_ranks_alike(on_eight):
    """A rank with more favoured experts than others would measure another step than the mean rank's."""
    bias = cases.skewed_bias(on_eight.model, 8)
    assert bias.shape == (60, 384)
    by_rank = np.sort(bias.reshape(60, 8, 48), axis=-1)
    assert (by_rank == by_rank[0, 0]).all()
    assert (bias[0] != bias[1]).any()
    counts = Counter(np.sign(by_rank[0, 0]).tolist())
    assert counts == {1.0: 3, -1.0: 12, 0.0: 33}
    # Among scores as they are at random, the favoured are chosen about eight times as often.
    scores = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=(4096, 384))))
    threshold = 1 / (1 + np.exp(-2.037))  # one in 48
    chosen = (scores + bias[0] > threshold).mean(axis=0) * 48
    assert chosen[bias[0] > 0].mean() == pytest.approx(8, rel=0.05)
    assert chosen[bias[0] < 0].mean() < 0.1


def test_loads_are_those_of_the_experts_here(on_eight):
    load = np.zeros((60, 384), np.int64)
    load[:, :48] = 8192 * 8 // 384
    load[0, 0] *= 25  # of the first layer, 1.5 × the mean and two passes at the default's buffer
    load[:, 48:] = 10**6  # other ranks' experts
    found = loads(on_eight, load, 8192)
    assert found.mean == 8192 * 8
    assert found.received[1] == 8 * 48 * 170
    assert found.received[0] / found.mean == pytest.approx(1.5 * 170 / 170.67, rel=0.01)
    assert found.busiest == pytest.approx(25 * 170 / 170.67, rel=0.01)
    load[0, 0] *= 2
    assert loads(on_eight, load, 8192).passes.tolist() == [2.0] + [1.0] * 59


def test_a_start_is_the_sum_of_its_phases():
    startup = Startup()
    startup.done("something")
    assert startup.total == pytest.approx(startup.last, abs=0.02)


def host_base(rank):
    """Random weights of a rank drawn by NumPy, which has nothing to compile."""
    rng, definition = np.random.default_rng(0), rank.model_def
    sizes = {"data": rank.ranks.data, "expert": rank.ranks.expert}
    base = {}
    for path, leaf in definition.base_shapes.items():
        shape = local_shape(path, leaf.shape, definition.base_specs[path], sizes)
        drawn = rng.integers(-8, 8, shape) if path.endswith("values") else rng.normal(0, 0.1, shape)
        base[path] = jnp.asarray(drawn * ("bias" not in path), leaf.dtype)
    return base


def test_the_gradient_of_a_deep_rank_is_finite(tmp_path):
    """Whatever stands in for the other ranks must not make derivatives that grow from layer to layer."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    run = tiny_run(tmp_path, checkpoint, train__sequence_length=16, lora__targets=["attention"])
    config = load_config(run | {"mesh": {"expert": 2, "expert_buffer": 2.0}})
    deep = replace(load_model_config(checkpoint), num_hidden_layers=24)
    rank = make_rank(config, deep)
    batch = {field: jnp.asarray(v) for field, v in cases.make_case(rank, "constant").batch.items()}
    gradients = jax.jit(make_gradients(rank.model_def, 16))
    sums = gradients(make_state(rank).adapters, host_base(rank), batch).sums
    norms = {path: float(jnp.linalg.norm(value)) for path, value in sums.items()}
    assert all(np.isfinite(norm) for norm in norms.values()), norms
    assert any(norm > 0 for norm in norms.values())


def test_a_whole_run(tmp_path, capsys, monkeypatch):
    """A tiny rank of two, all cases; what the profiler would say of a GPU is put in its place."""
    monkeypatch.setattr(bench_step, "make_base", host_base)
    monkeypatch.setattr(measuring, "has_gpu", lambda: True)
    monkeypatch.setattr(measuring, "NO_COMMAND_BUFFERS", {"xla_backend_optimization_level": 0})

    def traced(step, keep):
        jax.block_until_ready(step())
        kernels = [Event("kernel", 0.0, 1.0, "", AHEAD + "exchange/tile"), Event("other", 3.0, 1.0)]
        return {0: kernels}

    monkeypatch.setattr(measuring, "traced", traced)
    checkpoint = write_tiny_checkpoint(
        tmp_path / "checkpoint", num_hidden_layers=1, first_k_dense_replace=0
    )
    path, result = tmp_path / "run.yaml", tmp_path / "result.json"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path, checkpoint)), encoding="utf-8")
    options = ["--config", str(path), "--json", str(result), "--steps", "1"]
    changes = [
        "mesh.expert=2",
        "mesh.expert_buffer=1",
        "train.micro_batch=4",
        "lora.targets=[routed]",
    ]
    bench_step.main([*options, *changes])
    found = json.loads(result.read_text(encoding="utf-8"))
    (length,) = found["lengths"]
    measured = {f"{case['routing']}, {case['rows']}": case for case in length["cases"]}
    assert list(measured) == [f"{a}, {b}" for a in cases.ROUTINGS for b in cases.ROWS]
    assert all(case["finite"] and len(case["seconds"]) == 1 for case in measured.values())
    assert (length["length"], length["rows"]) == (48, 2)
    natural, skewed = (measured[f"{name}, constant"] for name in cases.ROUTINGS)
    assert skewed["loads"]["busiest_expert_to_mean"] > natural["loads"]["busiest_expert_to_mean"]
    (broken_down,) = length["traced"]
    assert broken_down["case"] == "natural, constant"
    assert broken_down["idle_share_as_measured"] == 0.5
    assert length["exchange"]["stand_ins_s"] == 1.0
    assert found["machine"]["overrides"][0] == "mesh.expert=2"
    assert found["startup"]["total_s"] > 0
    printed = capsys.readouterr().out
    assert "Exchanges of the real run" in printed
    assert "not attributed: 1000.00 ms other" in printed
