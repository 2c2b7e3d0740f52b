"""`tools/bench_exchange.py` on simulated devices: both ways of bringing rows back are right."""

from argparse import Namespace

import pytest

from tools.bench_exchange import WAYS, measure

DEVICES, TOKENS, WIDTH = 4, 48, 448


@pytest.mark.parametrize("way", ["sums", "copies"])
def test_what_is_timed_is_right(way):
    """Sums of four bf16 rows, rounded once or on the way: a few times 2⁻⁹ of their size."""
    found = measure(WAYS[way], Namespace(devices=DEVICES, tokens=TOKENS, width=WIDTH))
    assert found["devices"] == DEVICES
    assert found["gather is right"]
    assert found["sum's relative error"] < 4e-3
    assert all(found[f"{name}, ms"] > 0 for name in ("gather", "sum", "product"))
