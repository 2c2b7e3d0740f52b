"""Where every array of a full-size run lives, and what it weighs, against arithmetic by hand."""

from pathlib import Path

import pytest

from kimi_jax.model.params import weight_table
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.planning.arrays import (
    ADAPTERS,
    ENDS,
    EXPERT_ADAPTERS,
    OTHER,
    PACKED,
    SCALES,
    adapter_bytes,
    base_bytes,
    sharding_lines,
)
from kimi_jax.planning.memory import sizing_of

GOLDEN = Path(__file__).parents[2] / "golden" / "sharding"
GIB = 2**30


def ranks(expert, rest="sharded"):
    return Ranks(expert, alone=expert > 1, rest=rest)


def test_sharding_of_every_array(on_eight, model):
    """A changed rule, axis or shape shows here. To accept it, run tools/dump_sharding.py."""
    sizing = sizing_of(on_eight(), model)
    lines = sharding_lines(sizing.table, sizing.adapters, sizing.ranks)
    golden = (GOLDEN / "k2_thinking_8.txt").read_text(encoding="utf-8").splitlines()
    assert lines == golden


def test_lines_add_up_to_the_plan(on_eight, model):
    sizing = sizing_of(on_eight(), model)
    lines = sharding_lines(sizing.table, sizing.adapters, sizing.ranks)
    total = sum(int(line.split()[-1]) for line in lines)
    base, adapters = base_bytes(sizing.table, ranks(8)), adapter_bytes(sizing.adapters, ranks(8))
    assert total == sum(base.values()) + sum(adapters.values())


def test_experts_of_one_of_eight(model):
    """48 of 384 experts in 60 layers, 3 · 2048 · 7168 values each: half a byte, and 2 for each 32."""
    values = 60 * 48 * 3 * 2048 * 7168
    found = base_bytes(weight_table(model), ranks(8))
    assert found[PACKED] == values // 2
    assert found[SCALES] == values // 32 * 2
    assert (found[PACKED] + found[SCALES]) / GIB == pytest.approx(66.4, abs=0.05)


@pytest.mark.parametrize(
    ("expert", "rest", "gigabytes"),
    [
        (1, "sharded", 23.44),  # the whole
        (8, "sharded", 2.93),  # an eighth of it, and vectors whole
        # 18.75 of layers whole, and an eighth of 2 · 163840 · 7168 · 2 bytes of embedding and head
        (8, "replicated", 18.75 + 4.70 / 8),
    ],
)
def test_the_rest_of_the_model(model, expert, rest, gigabytes):
    found = base_bytes(weight_table(model), ranks(expert, rest))
    assert (found[OTHER] + found[ENDS]) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_all_ranks_hold_the_model_once(model):
    """Sharded, eight devices together hold little more than the download: vectors are repeated."""
    table = weight_table(model)
    whole = sum(weight.bytes for weight in table)
    assert whole == 594_205_351_936
    together = 8 * sum(base_bytes(table, ranks(8)).values())
    assert 0 < together - whole < 20e6


def test_adapters_live_with_their_experts(on_eight, model):
    """Rank 8, one pair an expert: 48 · 3 · (7168 + 2048) · 8 fp32 values in each of 60 layers."""
    found = adapter_bytes(sizing_of(on_eight(), model).adapters, ranks(8))
    assert found[EXPERT_ADAPTERS] == 60 * 48 * 3 * (7168 + 2048) * 8 * 4
    shared = on_eight("lora.expert_factors=shared")
    one_side = adapter_bytes(sizing_of(shared, model).adapters, ranks(8))
    # The factor on the hidden side is one for all experts, and whole on every device.
    assert one_side[EXPERT_ADAPTERS] == 60 * 3 * (48 * 2048 + 7168) * 8 * 4
    assert one_side[ADAPTERS] == found[ADAPTERS]
