"""`tools/bench_node.py`: what is hidden behind what, a node's run and its ranks, and all of it on CPUs."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml

from kimi_jax.config_file import load_config
from kimi_jax.errors import UserError
from kimi_jax.model.config import load_model_config
from kimi_jax.parallel.ranks import make_ranks
from tests.unit.support import tiny_run, write_tiny_checkpoint
from tests.unit.tools.test_bench_step import AHEAD, PROGRAM
from tools import bench_node
from tools.node_bench import worker as workers
from tools.node_bench.cases import Wanted, measure_cases
from tools.node_bench.checkpoint import differing
from tools.node_bench.comparison import compare
from tools.node_bench.importing import GIB, fitting_config, room
from tools.node_bench.size import cut
from tools.step_bench import cases, measuring, parts
from tools.step_bench.loads import loads
from tools.step_bench.overlap import Overlap, overlap
from tools.step_bench.parts import FORWARD, ONCE
from tools.step_bench.rank import make_rank, make_state
from tools.step_bench.trace import Event, break_down, events_of, exchanges, is_exchange

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("computing", "exchanging", "wanted"),
    [
        # An exchange begins alone, goes on beside two kernels and the gap between them, and ends alone.
        ([(2, 3), (4, 6)], [(1, 7)], (6, 3, 6, 3, 3, 0)),
        # Two exchanges at once count once; a kernel within a kernel too; between 5 and 8 nothing runs.
        ([(0, 4), (1, 2)], [(3, 5), (3.5, 4.5), (8, 9)], (9, 4, 3, 1, 2, 3)),
        ([(0, 1)], [(1, 2)], (2, 1, 1, 0, 1, 0)),  # one after the other: nothing hidden
        ([(0, 3)], [], (3, 3, 0, 0, 0, 0)),
        ([], [], (0, 0, 0, 0, 0, 0)),
    ],
)
def test_overlap(computing, exchanging, wanted):
    assert overlap(reversed(computing), reversed(exchanging)) == Overlap(*wanted)


def test_overlap_of_any_spans():
    """Against counting moments one by one."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        kinds = []
        for count in rng.integers(1, 8, 2):
            begins, lengths = rng.integers(0, 40, count), rng.integers(1, 9, count)
            kinds.append([(int(b), int(b + n)) for b, n in zip(begins, lengths, strict=True)])
        at = [np.zeros(60, bool), np.zeros(60, bool)]
        for moments, spans in zip(at, kinds, strict=True):
            for begin, end in spans:
                moments[begin:end] = True
        either = np.flatnonzero(at[0] | at[1])
        span = either[-1] - either[0] + 1
        counted = (at[0], at[1], at[0] & at[1], at[1] & ~at[0])
        assert overlap(*kinds) == (span, *(m.sum() for m in counted), span - len(either))


@pytest.mark.parametrize(
    ("kernel", "instruction", "wanted"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "", True),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_SIMPLE", "command_buffer_7", True),
        ("MemcpyP2P", "", True),
        ("something", "all_gather.220.2.remat2", True),
        ("something", "psum.312.2", True),
        ("MemcpyD2D", "copy.4", False),
        ("input_reduce_scatter_fusion_3", "input_reduce_scatter_fusion.3", False),
        ("input_reduce_select_fusion", "", False),
        ("nvjet_sm90_tst_128x256", "custom-call.1", False),
    ],
)
def test_which_kernels_exchange(kernel, instruction, wanted):
    assert is_exchange(Event(kernel, 0.0, 1.0, instruction)) == wanted


def test_exchanges_beside_computation_are_not_counted_twice():
    """In the parts of a step they appear where nothing else ran, whatever began first."""
    events = [
        Event("ncclDevKernel_AllGather", 9.0, 4.0, "all_gather.1"),
        Event("nvjet_sm90", 10.0, 2.0, "custom-call.1"),
        Event("loop_broadcast_fusion_13", 14.0, 1.0, "loop_broadcast_fusion.13"),
        Event("ncclDevKernel_ReduceScatter", 14.5, 1.0),
    ]
    found = break_down(events, PROGRAM)
    assert found.parts == {
        (parts.PROJECTIONS, FORWARD): 2.0,
        (parts.EXCHANGES, FORWARD): 1.0,  # the copies, by their frames
        (parts.EXPOSED, ONCE): 2.5,
        (parts.IDLE, ONCE): 1.0,
    }
    assert found.span == sum(found.parts.values()) == 6.5
    spans, kernels = exchanges(events)
    assert spans == Overlap(6.5, 3.0, 5.0, 2.5, 2.5, 1.0)
    assert kernels["ncclDevKernel_AllGather"] == (4.0, 1)


def test_what_travels_to_the_host_is_counted_where_nothing_else_ran():
    """It is no computation: an exchange beside it is not hidden."""
    events = [
        Event("MemcpyD2H", 9.0, 2.0),
        Event("nvjet_sm90", 10.0, 2.0, "custom-call.1"),
        Event("ncclDevKernel_AllGather", 11.5, 1.5, "all_gather.1"),
        Event("MemcpyH2D", 12.5, 1.5),
        Event("MemcpyD2D", 15.0, 1.0, "", "jit(step)/jit(main)"),  # whose place is not known
    ]
    found = break_down(events, PROGRAM)
    assert found.parts == {
        (parts.PROJECTIONS, FORWARD): 2.0,
        (parts.EXPOSED, ONCE): 1.0,
        (parts.HOST, ONCE): 2.0,
        (parts.REST_STACKS, ONCE): 1.0,
        (parts.IDLE, ONCE): 1.0,
    }
    assert found.span == sum(found.parts.values()) == 7.0
    assert found.travelled == {"MemcpyD2H": 2.0, "MemcpyH2D": 1.5}
    assert exchanges(events)[0] == Overlap(6.0, 3.0, 1.5, 0.5, 1.0, 2.0)


def test_events_are_told_apart_by_gpu():
    def plane(name, *lines):
        return SimpleNamespace(name=name, lines=lines)

    def line(name, *kernels):
        events = [
            SimpleNamespace(name=k, start_ns=2e9, duration_ns=5e8, stats=[("hlo_op", "add.1")])
            for k in kernels
        ]
        return SimpleNamespace(name=name, events=events)

    planes = [
        plane("/device:GPU:1", line("Stream #7(Compute)", "b"), line("Stream #9(Memcpy)", "c")),
        plane("/host:CPU", line("Stream of nothing", "d")),
        plane("/device:GPU:0", line("Stream #7(Compute)", "a"), line("XLA Ops", "a")),
        plane("/device:GPU:2", line("XLA Modules", "e")),
    ]
    found = events_of(SimpleNamespace(planes=planes))
    assert {number: [e.kernel for e in events] for number, events in found.items()} == {
        0: ["a"],
        1: ["b", "c"],
    }
    assert found[0][0] == Event("a", 2.0, 0.5, "add.1")


@pytest.fixture(scope="module")
def recipe():
    path = ROOT / "configs" / "k2_thinking_8xh200.yaml"
    return load_config(path, [f"model.checkpoint={ROOT / 'configs' / 'k2_thinking'}"])


def test_eight_gpus_have_the_whole_model(recipe):
    node = cut(recipe, 8, None, None)
    assert (node.config, node.missing) == (recipe, ())
    assert node.model == load_model_config(Path(recipe.model.checkpoint))


def test_fewer_gpus_hold_what_each_of_eight_would(recipe):
    node = cut(recipe, 4, None, None)
    assert node.model.n_routed_experts == 192
    assert node.config.train.micro_batch == 12
    assert node.config.mesh.model_dump() == recipe.mesh.model_dump() | {"expert": 4}
    assert node.model.num_hidden_layers == 61
    assert "192 of 384 experts a layer, 48 on each GPU" in node.missing
    assert node.saved_bytes == 12 * node.trained
    assert "12 of 61 layers" in cut(recipe, 8, None, 12).missing
    for wrong in ((0, None, None), (2, 3, None), (4, None, 0)):
        with pytest.raises(UserError, match=r"required"):
            cut(recipe, *wrong)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A tiny run on four simulated devices."""
    folder = tmp_path_factory.mktemp("four")
    checkpoint = write_tiny_checkpoint(
        folder / "checkpoint", num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=8
    )
    values = tiny_run(folder, checkpoint, train__micro_batch=16, lora__targets=["routed"])
    values["mesh"] = {"expert": 8, "expert_buffer": 1.1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def on_four(four):
    node = cut(load_config(four), 4, 2, None)
    return make_rank(node.config, node.model, make_ranks(node.config.mesh))


def test_every_rank_has_rows_of_its_own(on_four):
    """Equal rows would be routed alike, and loads would say nothing of a real step's."""
    for rows in cases.ROWS:
        case = cases.make_case(on_four, rows)
        assert case.batch["tokens"].shape == (1, 8, 48)
        assert len({row.tobytes() for row in case.batch["tokens"][0]}) == 8
        assert case.tokens_a_rank == case.real_tokens / 4
        placed = on_four.place(case.batch)["tokens"]
        assert [part.data.shape for part in placed.addressable_shards] == [(1, 2, 48)] * 4


def test_loads_are_each_ranks(on_four):
    load = np.zeros((1, 8), int)
    load[0] = [10, 20, 30, 40, 0, 0, 50, 50]  # of 100 tokens, two each
    found = [loads(on_four, load, 100, number) for number in range(4)]
    assert [one.ratio for one in found] == [0.6, 1.4, 0.0, 2.0]
    assert found[1].busiest == 40 / 25
    assert [one.mean for one in found] == [50.0] * 4


def test_states_of_ranks_differ_only_where_they_are_split(on_four):
    adapters = make_state(on_four).adapters
    for path, value in adapters.items():
        drawn = [np.asarray(part.data) for part in value.addressable_shards]
        alike = all((one == drawn[0]).all() for one in drawn[1:])
        split = "expert" in on_four.model_def.adapter_specs[path]
        assert alike == (not split or path.endswith("lora_B")), path


def test_overrides_may_follow_the_sections():
    given = ["--config", "f", "--sections", "step", "decode", "train.steps=3"]
    options = bench_node.arguments([*given, "--worker", "step,decode"])
    assert options.sections == options.worker == ["step", "decode"]
    assert options.overrides == ["train.steps=3"]
    for wrong in (["stepp"], ["train.steps=3"]):
        with pytest.raises(SystemExit):
            bench_node.arguments(["--config", "f", "--sections", *wrong])


class Failing:
    """A bench whose steps ahead of the host do not fit."""

    def __init__(self, rank):
        self.rank, self.state, self.compiled, self.base = rank, {}, None, None
        self.made = []

    def case(self, rows):
        return cases.make_case(self.rank, rows)

    def step(self, compiled, base, batch, after=None):
        if after is not None:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        self.made.append(batch)
        one = np.float32(1.0)
        return measuring.StepMetrics(
            *map(jax.numpy.asarray, (one, one, one, np.ones((1, 8)), True))
        )

    def mfu(self, rate):
        return {"4N": rate}


def test_what_does_not_fit_ahead_is_measured_blocked(on_four):
    bench, found, times = Failing(on_four), [], []
    wanted = [Wanted("constant", "one ahead", 3), Wanted("packed", "blocked", 2)]
    measure_cases(bench, wanted, found, lambda e: {"error": str(e)}, lambda: times.append(1))
    assert [(c["rows"], c["how"], c["steps"]) for c in found] == [
        ("constant", "one ahead", 3),
        ("constant", "blocked", 3),
        ("packed", "blocked", 2),
    ]
    assert ["error" in case for case in found] == [True, False, False]
    assert len(found[1]["seconds"]) == len(found[1]["losses"]) == 3
    assert len(found[1]["loads"]) == 4
    assert len(times) == 3


def test_synthetic_checkpoints_fit(tmp_path):
    assert room(tmp_path, 1e9, 0) * GIB < 1e15
    assert room(tmp_path, 0.5, 0) == 0.5
    assert room(tmp_path, 0.5, 10**18) == 0.0
    with pytest.raises(UserError, match="too little"):
        fitting_config(0.0)
    assert fitting_config(0.05)["num_hidden_layers"] > 1


def test_bits_that_differ_are_found():
    one = {"a": jax.numpy.asarray([1.0, np.nan, 0.0]), "b": jax.numpy.asarray([3], np.int32)}
    assert differing(one, dict(one)) == []
    assert differing(one, one | {"a": jax.numpy.asarray([1.0, np.nan, -0.0])}) == ["['a']"]


def test_comparison_needs_both():
    case = {
        "rows": "constant",
        "routing": "natural",
        "how": "blocked",
        "median_s": 2.0,
        "loads": [],
    }
    rank = {"cases": [case], "usual": {"parts": [{"part": parts.EXPERTS, "seconds": 1.0}]}}
    usual = [
        {"part": parts.EXPERTS, "seconds": 0.8},
        {"part": parts.EXPERTS, "seconds": 0.4},
        {"part": parts.EXPOSED, "seconds": 0.5},
    ]
    step = {"cases": [case | {"median_s": 2.5}], "usual": {"parts": usual}}
    assert compare({"rank": rank}) is None
    assert compare({"rank": {"cases": [case | {"error": "x"}]}, "step": step}) is None
    found = compare({"rank": rank, "step": step})
    assert found["steps"] == [{"what": "step, blocked, median", "alone_s": 2.0, "all_s": 2.5}]
    assert [(row["part"], row["alone_s"], row["all_s"]) for row in found["parts"]] == [
        (parts.EXPOSED, 0.0, 0.5),
        (parts.EXPERTS, 1.0, pytest.approx(1.2)),
    ]


def host_base(rank):
    """Random weights drawn by NumPy, which has nothing to compile."""
    rng, definition = np.random.default_rng(0), rank.model_def
    base = {}
    for path, leaf in definition.base_shapes.items():
        whole = leaf.shape
        drawn = rng.integers(-8, 8, whole) if path.endswith("values") else rng.normal(0, 0.1, whole)
        value = (drawn * ("bias" not in path)).astype(leaf.dtype)
        base[path] = rank.ranks.put(value, definition.base_specs[path])
    return base


class InProcess:
    """A worker that has run by the time it is started."""

    def __init__(self, arguments, changes):
        try:
            bench_node.main(arguments)
            self.code = 0
        except SystemExit as end:
            self.code = end.code

    def wait(self, timeout=None):
        return self.code

    def poll(self):
        return self.code


def traced(step, keep):
    """What the profiler would say of two GPUs."""
    jax.block_until_ready(step())
    kernels = [
        Event("kernel", 0.0, 1.0, "", AHEAD + "exchange/tile"),
        Event("ncclDevKernel_AllGather", 0.5, 1.0),
        Event("other", 3.0, 1.0),
    ]
    return {0: kernels, 1: kernels[1:]}


@pytest.fixture
def in_process(monkeypatch):
    """The whole bench in this process, with GPUs that are not there."""
    for module in (measuring, workers):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setattr(measuring, "NO_COMMAND_BUFFERS", {"xla_backend_optimization_level": 0})
    monkeypatch.setattr(measuring, "traced", traced)
    monkeypatch.setattr(bench_node, "start", InProcess)
    monkeypatch.setattr(workers, "make_base", host_base)
    monkeypatch.setattr(workers, "BATCHES", (2,))
    before, thorough = signal.getsignal(signal.SIGTERM), "jax_disable_most_optimizations"
    was = jax.config.read(thorough)
    jax.config.update(thorough, True)
    yield
    jax.config.update(thorough, was)
    signal.signal(signal.SIGTERM, before)


def test_a_whole_node(four, tmp_path, capsys, in_process):
    result = tmp_path / "found.json"
    given = ["--config", str(four), "--devices", "4", "--experts-a-rank", "2", "--steps", "3"]
    given += ["--json", str(result), "--directory", str(tmp_path / "files"), "--gib", "0.03"]
    given += ["--few", "2", "--new-tokens", "4", "--limit", "1e9", "train.learning_rate=1e-3"]
    bench_node.main(given)
    found = json.loads(result.read_text(encoding="utf-8"))
    sections = found["sections"]
    assert {name: one["state"] for name, one in sections.items()} == dict.fromkeys(
        bench_node.SECTIONS, "done"
    )
    step = sections["step"]
    assert [(c["rows"], c["how"], len(c["seconds"])) for c in step["cases"]] == [
        ("constant", "blocked", 2),
        ("constant", "one ahead", 3),
        ("packed", "one ahead", 4),
        ("constant", "one ahead", 2),
    ]
    assert [c["routing"] for c in step["cases"]] == ["natural"] * 3 + ["skewed"]
    steady = step["cases"][1]
    assert steady["real_tokens"] == 4 * 2 * 48
    assert steady["tokens_a_second"] == pytest.approx(4 * steady["tokens_a_second_gpu"])
    assert steady["losses"][-1] < step["cases"][0]["losses"][0]  # one and the same rows
    assert sum(load["received_to_mean"] for load in steady["loads"]) == pytest.approx(4)
    assert (step["overlap"][0]["hidden"], step["overlap"][0]["exposed"]) == (0.5, 0.5)
    assert len(step["overlap"]) == 2
    assert len(step["memory"]) == 4
    assert step["collectives"]
    assert sections["breakdown"]["span_s"] == 4.0
    assert sections["checkpoint"]["equal"]
    assert sections["checkpoint"]["updates_made"] == 1 + 2 + 3 + 4 + 2 + 1 + 2 + 4
    assert [row["batch"] for row in sections["decode"]["batches"]] == [2]
    assert set(sections["import"]) >= {"cold", "warm", "written"}
    assert found["comparison"]["steps"]
    assert not found["node"]["whole_model"]
    assert found["machine"]["overrides"] == ["train.learning_rate=1e-3"]
    assert list((tmp_path / "files").iterdir()) == []
    printed = capsys.readouterr().out
    assert "NOT THE WHOLE MODEL" in printed
    assert "Summary" in printed


def test_a_failing_section_is_told_by_the_exit_code(four, tmp_path, capsys, in_process):
    """Eight experts cannot be shared by the mesh, which has three devices."""
    result = tmp_path / "found.json"
    given = [
        "--config",
        str(four),
        "--devices",
        "3",
        "--sections",
        "checkpoint",
        "--json",
        str(result),
    ]
    with pytest.raises(SystemExit) as end:
        bench_node.main([*given, "--directory", str(tmp_path / "files"), "--limit", "1e9"])
    assert end.value.code == 1
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["sections"]["checkpoint"]["state"] == "failed"
    assert "failed" in capsys.readouterr().out
