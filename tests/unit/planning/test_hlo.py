"""Collectives and shapes read from a program's text."""

from kimi_jax.planning.hlo import Array, collectives, results, summary

PROGRAM = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%async (p: f32[16,4]) -> f32[2,4] {
  ROOT %reduce-scatter.3 = f32[2,4]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (c: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %x = f32[2,4]{1,0} get-tuple-element(%c), index=1
  %all-gather-start.1 = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x), dimensions={0}
  %all-gather-done.1 = f32[16,4]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter-start = ((f32[16,4]), f32[2,4]) async-start(%all-gather-done.1), calls=%async
}

%condition (c: (s32[], f32[2,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p0: f32[2,4], p1: s4[3,8,4]) -> f32[2,4] {
  %p1 = s4[3,8,4]{2,1,0:E(4)} parameter(1)
  %while.1 = (s32[], f32[2,4]) while(%t), condition=%condition, body=%body, FIVE
  %all-reduce.9 = (f32[], bf16[3,4]{1,0}) all-reduce(%l, %g), to_apply=%add
}
""".replace("FIVE", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_collectives_and_how_often_they_run():
    found = {(c.kind, tuple(str(a) for a in c.result), c.runs) for c in collectives(PROGRAM)}
    assert found == {
        ("reduce-scatter", ("f32[2,4]",), 5),
        ("all-gather", ("f32[16,4]",), 5),
        ("all-reduce", ("f32[]", "bf16[3,4]"), 1),
    }


def test_summary_counts_bytes_of_a_step():
    assert summary(collectives(PROGRAM))["all-gather"] == {
        "count": 1,
        "runs": 5,
        "bytes": 5 * 16 * 4 * 4,
    }


def test_results():
    found = results(PROGRAM)
    assert found["parameter", Array("s4", (3, 8, 4))] == 1
    assert found["all-gather-done", Array("f32", (16, 4))] == 1


def test_packed_values_take_half_a_byte():
    assert Array("s4", (3, 8, 4)).bytes == 48
