"""`tools/bench_bytes.py`: bytes of instructions of a small program, its loops, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from kimi_jax.config_file import load_config
from kimi_jax.errors import UserError
from kimi_jax.model.config import load_model_config
from kimi_jax.training.absent import abstract_step
from tools import bench_bytes
from tools.byte_count.program import read_program
from tools.byte_count.sections import sections_of, total
from tools.random_base import random_base
from tools.step_bench.cases import make_case
from tools.step_bench.rank import make_rank, make_state

ROOT = Path(__file__).parents[3]
ARCHITECTURE = ROOT / "configs" / "k2_thinking"
RECIPE = ROOT / "configs" / "k2_thinking_8xh200.yaml"

# Stacks of 10 layers of 1,000 floats: 4,000 bytes a layer, 40,000 the stack.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (s0: bf16[10,1000], s1: s32[], s2: f32[1000]) -> f32[1000] {
  %s0 = bf16[10,1000]{1,0} parameter(0)
  %s1 = s32[] parameter(1)
  %s2 = f32[1000]{0} parameter(2)
  %wide = f32[10,1000]{1,0} convert(%s0)
  %zero = s32[] constant(0)
  %layer = f32[1,1000]{1,0} dynamic-slice(%wide, %s1, %zero), dynamic_slice_sizes={1,1000}
  %flat = f32[1000]{0} bitcast(%layer)
  ROOT %both = f32[1000]{0} add(%flat, %s2)
}

%put (u0: f32[10,1000], u1: bf16[1000], u2: s32[]) -> (f32[10000], f32[1,1000]) {
  %u0 = f32[10,1000]{1,0} parameter(0)
  %u1 = bf16[1000]{0} parameter(1)
  %u2 = s32[] parameter(2)
  %value = f32[1000]{0} convert(%u1)
  %row = f32[1,1000]{1,0} bitcast(%value)
  %none = s32[] constant(0)
  %put.1 = f32[10,1000]{1,0} dynamic-update-slice(%u0, %row, %u2, %none)
  %put.2 = f32[10000]{0} bitcast(%put.1)
  ROOT %outputs = (f32[10000]{0}, f32[1,1000]{1,0}) tuple(%put.2, %row)
}

%not_in_place (n0: f32[10,1000], n1: f32[1,1000], n2: s32[]) -> bf16[10,1000] {
  %n0 = f32[10,1000]{1,0} parameter(0)
  %n1 = f32[1,1000]{1,0} parameter(1)
  %n2 = s32[] parameter(2)
  %first = s32[] constant(0)
  %changed = f32[10,1000]{1,0} dynamic-update-slice(%n0, %n1, %n2, %first)
  ROOT %narrow = bf16[10,1000]{1,0} convert(%changed)
}

%layer_of (l0: f32[10,1000], l1: s32[]) -> f32[1,1000] {
  %l0 = f32[10,1000]{1,0} parameter(0)
  %l1 = s32[] parameter(1)
  %l2 = s32[] constant(0)
  ROOT %l3 = f32[1,1000]{1,0} dynamic-slice(%l0, %l1, %l2), dynamic_slice_sizes={1,1000}
}

%wrapped (w0: f32[16,4]) -> f32[2,4] {
  %w0 = f32[16,4]{1,0} parameter(0)
  ROOT %scattered = f32[2,4]{1,0} reduce-scatter(%w0), dimensions={0}, to_apply=%add
}

%inner (i: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %i = (s32[], f32[1000]{0}) parameter(0)
  %i0 = s32[] get-tuple-element(%i), index=0
  %i1 = f32[1000]{0} get-tuple-element(%i), index=1
  %doubled = f32[1000]{0} add(%i1, %i1)
  ROOT %next = (s32[], f32[1000]{0}) tuple(%i0, %doubled)
}

%more (j: (s32[], f32[1000])) -> pred[] {
  %j = (s32[], f32[1000]{0}) parameter(0)
  %j0 = s32[] get-tuple-element(%j), index=0
  ROOT %less = pred[] compare(%j0, %j0), direction=LT
}

%helper (h0: f32[1000]) -> f32[1000] {
  %h0 = f32[1000]{0} parameter(0)
  ROOT %negative = f32[1000]{0} negate(%h0)
}

%body (c: (s32[], f32[1000], f32[10,1000])) -> (s32[], f32[1000], f32[10,1000]) {
  %c = (s32[], f32[1000]{0}, f32[10,1000]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %x = f32[1000]{0} get-tuple-element(%c), index=1
  %stack = f32[10,1000]{1,0} get-tuple-element(%c), index=2
  %fetch-start = ((f32[10,1000]{1,0}, s32[]), f32[1,1000]{1,0}, u32[]) fusion-start(%stack, %n), kind=kLoop, \
calls=%layer_of
  %start = (s32[], f32[1000]{0}) tuple(%n, %x)
  %while.2 = (s32[], f32[1000]{0}) while(%start), condition=%more, body=%inner
  %fetch-done = f32[1,1000]{1,0} fusion-done(%fetch-start)
  %y = f32[1000]{0} get-tuple-element(%while.2), index=1
  %called = f32[1000]{0} call(%y), to_apply=%helper
  ROOT %turned = (s32[], f32[1000]{0}, f32[10,1000]{1,0}) tuple(%n, %called, %stack)
}

ENTRY %main (p0: bf16[10,1000], p1: s32[], p2: f32[1000], p3: f32[10,1000], p4: s32[3,1], p5: f32[16,4]) \
-> f32[1000] {
  %p0 = bf16[10,1000]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1000]{0} parameter(2)
  %p3 = f32[10,1000]{1,0} parameter(3)
  %p4 = s32[3,1]{1,0} parameter(4)
  %p5 = f32[16,4]{1,0} parameter(5)
  %slice_fusion = f32[1000]{0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%sliced, \
metadata={op_name="jit(step)/add"}
  %thin = bf16[1000]{0} convert(%slice_fusion)
  %put_fusion = (f32[10000]{0}, f32[1,1000]{1,0}) fusion(%p3, %thin, %p1), kind=kLoop, calls=%put
  %put_row = f32[1,1000]{1,0} get-tuple-element(%put_fusion), index=1
  %whole_fusion = bf16[10,1000]{1,0} fusion(%p3, %put_row, %p1), kind=kLoop, calls=%not_in_place
  %alone = f32[10,1000]{1,0} dynamic-update-slice(%p3, %put_row, %p1, %p1)
  %gather.1 = f32[3,1000]{1,0} gather(%p3, %p4), offset_dims={1}, slice_sizes={1,1000}
  %scatter.1 = f32[10,1000]{1,0} scatter(%p3, %p4, %gather.1), update_window_dims={1}, to_apply=%add
  %copy-start.1 = (f32[1000]{0}, f32[1000]{0}, u32[]) copy-start(%p2)
  %copy-done.1 = f32[1000]{0} copy-done(%copy-start.1)
  %all-gather-start.1 = (f32[16,4]{1,0}, f32[128,4]{1,0}) all-gather-start(%p5), dimensions={0}
  %all-gather-done.1 = f32[128,4]{1,0} all-gather-done(%all-gather-start.1)
  %rs-start = ((f32[16,4]{1,0}), f32[2,4]{1,0}) async-start(%p5), calls=%wrapped
  %rs-update = ((f32[16,4]{1,0}), f32[2,4]{1,0}) async-update(%rs-start)
  %rs-done = f32[2,4]{1,0} async-done(%rs-update)
  %kernel.1 = (f32[1000]{0}, /*index=1*/s4[2000]{0:E(4)}) custom-call(%p3, %p3, %p2), \
custom_call_target="mosaic"
  %room = f32[10,1000]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %begin = (s32[], f32[1000]{0}, f32[10,1000]{1,0}) tuple(%p1, %p2, %p3)
  %while.1 = (s32[], f32[1000]{0}, f32[10,1000]{1,0}) while(%begin), condition=%more, body=%body, FIVE
  ROOT %result = f32[1000]{0} get-tuple-element(%while.1), index=1
}
""".replace("FIVE", 'backend_config={"known_trip_count":{"n":"5"}}')

LAYER, STACK = 4_000, 40_000


@pytest.fixture(scope="module")
def sections():
    return {section.name: section for section in sections_of(read_program(PROGRAM, "small"))}


@pytest.mark.parametrize(
    ("name", "read", "written"),
    [
        # Of a bf16 stack the slice alone, though a conversion stands between them; the index; a layer.
        ("slice_fusion", LAYER // 2 + 4 + LAYER, LAYER),
        # What is put in, as much to the stack as to the second output; nothing of the stack is read.
        ("put_fusion", LAYER // 2 + 4, LAYER + LAYER),
        # Converted after the update: all of it is read, and all is written.
        ("whole_fusion", STACK + LAYER + 4, STACK // 2),
        ("alone", LAYER + 4, LAYER),
        ("gather.1", 3 * LAYER + 12, 3 * LAYER),
        # Adds to three layers in place: reads them, indices and updates.
        ("scatter.1", 3 * LAYER + 12 + 3 * LAYER, 3 * LAYER),
        ("copy-start.1", LAYER, LAYER),
        ("all-gather-start.1", 256, 2048),
        ("rs-start", 256, 32),
        # A kernel's arrays whole, the one that it takes twice once; four bits an element.
        ("kernel.1", STACK + LAYER, LAYER + 1000),
    ],
)
def test_bytes_of_the_entry(sections, name, read, written):
    rows = {row.name: row for row in sections["entry"].rows}
    assert rows[name].moved == (read, written)


def test_an_asynchronous_pair_stands_at_its_start_alone(sections):
    rows = {row.name: row for section in sections.values() for row in section.rows}
    assert not [name for name in rows if "done" in name or "update" in name]
    assert rows["fetch-start"].moved == (LAYER + 4, LAYER)
    assert [str(array) for array in rows["fetch-start"].results] == ["f32[1,1000]"]


def test_kernels_and_exchanges_are_apart(sections):
    rows = sections["entry"].rows
    groups = {row.name: row.group for row in rows if row.group != "compiled"}
    assert groups == {
        "kernel.1": "kernel",
        "all-gather-start.1": "exchange",
        "rs-start": "exchange",
    }
    assert {row.name: row.kind for row in rows}["rs-start"] == "reduce-scatter"
    assert sections["entry"].total("kernel") == STACK + 2 * LAYER + 1000


def test_loops_have_their_turns(sections):
    found = {name: (s.inside, s.turns, s.runs) for name, s in sections.items()}
    assert found == {
        "entry": ("", 1, 1),
        "while.1": ("entry", 5, 5),
        "while.2": ("while.1", None, 5),
    }
    # What a call runs is the caller's; a value that is taken twice is read once.
    assert {row.name for row in sections["while.1"].rows} == {"fetch-start", "negative"}
    assert sections["while.2"].total("compiled") == 2 * LAYER
    loops = [sections["while.1"], sections["while.2"]]
    assert total(loops, "compiled") == 5 * (2 * LAYER + 4 + 2 * LAYER) + 5 * 2 * LAYER


def test_rows_are_ranked(sections):
    sizes = [row.moved.both for row in sections["entry"].rows]
    assert sizes == sorted(sizes, reverse=True)


def test_a_saved_program_is_counted(tmp_path: Path, capsys):
    """The command from a file to its table and JSON."""
    program, written = tmp_path / "step.hlo", tmp_path / "bytes.json"
    program.write_text(PROGRAM)
    options = ["--least-mb", "0.02", "--rate", "0.001", "--json", str(written)]
    bench_bytes.main(["--program", str(program), *options])
    printed = capsys.readouterr().out
    lines = {line.split()[5]: line for line in printed.splitlines() if "fusion kLoop" in line}
    assert set(lines) == {"whole_fusion"}  # the others are smaller
    assert lines["whole_fusion"].split()[:3] == ["0.0", "0.0", "64.0"]  # 64,004 bytes at 1 GB/s
    assert "while.1 (body) in entry: 5 turns, 5 a step" in printed
    # Five times through the outer loop, each time one turn of the inner one.
    assert "Of it 0 MB, 0.040 ms in loops whose turns the compiler does not know" in printed
    assert "none or many: while.2." in printed
    content = json.loads(written.read_text())
    entry = content["sections"][0]
    row = next(row for row in entry["rows"] if row["name"] == "slice_fusion")
    assert (row["read"], row["written"], row["source"]) == (6_004, 4_000, "jit(step)/add")
    assert content["bytes_a_step"]["exchange"] == 256 + 2048 + 256 + 32


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"module @jit_step { func.func public @main() }", "no ENTRY computation"),
        (b"\xff\xfe\x00HLO", "not text"),
        (PROGRAM.replace("fusion-done(", "fusion(").encode(), "started and never done"),
        (PROGRAM.replace("calls=%layer_of", "calls=%lost").encode(), "%lost, which %fetch-start"),
    ],
)
def test_what_is_no_whole_program_is_refused(tmp_path: Path, text, complaint):
    program = tmp_path / "step.hlo"
    program.write_bytes(text)
    with pytest.raises(UserError, match=complaint):
        bench_bytes.main(["--program", str(program)])


def test_missing_file_and_options_of_the_other_way_are_refused(tmp_path: Path, capsys):
    with pytest.raises(UserError, match="no such file"):
        bench_bytes.main(["--program", str(tmp_path / "none.hlo")])
    with pytest.raises(SystemExit) as ended:
        bench_bytes.main(["--program", "step.hlo", "--layers", "4"])
    assert ended.value.code == 2
    assert "leave out: layers" in capsys.readouterr().err


def test_a_rank_alone_takes_its_parts():
    """What is compiled has the shapes of what `tools/bench_step.py` runs."""
    config = load_config(RECIPE, [f"model.checkpoint={ARCHITECTURE}"])
    rank = make_rank(config, replace(load_model_config(ARCHITECTURE), num_hidden_layers=2))
    device = jax.devices()[1]
    _, (state, base, batch, _) = abstract_step(config, rank.model, rank.ranks, device)
    run = (
        jax.eval_shape(lambda: make_state(rank)),
        jax.eval_shape(lambda: random_base(rank.model_def)),
        make_case(rank, "constant").batch,
    )
    compiled = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, base, batch))
    assert compiled == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), run)
    leaves = jax.tree.leaves((state, base, batch))
    assert all(leaf.sharding.device_set == {device} for leaf in leaves)
