"""`impl="auto"` of the grouped matmul: what is chosen where, and that it is said once."""

import logging

import jax.numpy as jnp
import pytest

from kimi_jax.kernels import api
from kimi_jax.kernels.grouped_matmul import choice, mosaic
from kimi_jax.kernels.grouped_matmul.measured import MILLISECONDS
from kimi_jax.kernels.say import say_once
from kimi_jax.kernels.target import compiling_for
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight

GROUPS, SIZE = 2, 256


@pytest.fixture(autouse=True)
def nothing_said():
    say_once.cache_clear()


def operands(dtype=jnp.bfloat16, size=SIZE, rows=4):
    values = jnp.zeros((GROUPS, size, size), jnp.int4)
    weight = PackedWeight(values, jnp.zeros((GROUPS, size // 32, size), jnp.bfloat16))
    return jnp.zeros((rows, size), dtype), weight


def chosen_on(kind, x, weight, adapter=None):
    with compiling_for(kind):
        return choice.choose(x, weight, adapter)


def test_a_cpu_takes_the_reference():
    assert chosen_on("cpu", *operands()) == "reference"


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
def test_a_hopper_gpu_takes_the_packed_kernel(kind):
    assert chosen_on(kind, *operands()) == "pallas"


def test_other_gpus_take_the_reference_and_say_so_once(caplog):
    """A slow choice that nobody is told of would look like a slow library."""
    for _ in range(2):
        assert chosen_on("NVIDIA A100-SXM4-80GB", *operands()) == "reference"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "many times slower" in record.getMessage()
    assert "NVIDIA A100-SXM4-80GB is not a Hopper GPU" in record.getMessage()


@pytest.mark.parametrize(
    ("x", "weight", "adapter", "reason"),
    [
        (*operands(jnp.float32), None, "rows are float32"),
        (*operands(size=192), None, "in is 192"),
        (operands()[0], jnp.zeros((GROUPS, SIZE, SIZE)), None, "the weight is not packed int4"),
        (
            *operands(),
            GroupedAdapter(jnp.zeros((65, SIZE)), jnp.zeros((SIZE, 65)), 1.0),
            "rank is 65",
        ),
    ],
    ids=["rows", "shape", "weight", "rank"],
)
def test_operands_that_the_kernel_does_not_take_are_named(x, weight, adapter, reason, caplog):
    assert chosen_on("NVIDIA H200", x, weight, adapter) == "reference"
    assert reason in caplog.text


def test_the_choice_is_said_once_for_each_kind_of_operands(caplog):
    caplog.set_level(logging.INFO)
    for x, weight in (operands(), operands(), operands(size=512)):
        chosen_on("NVIDIA H200", x, weight)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        f"grouped matmul, 2 x {size} -> {size}, bfloat16 rows" for size in (256, 512)
    ]


def test_the_faster_one_by_the_table_is_taken(monkeypatch):
    """Fails if the table is not read, or read at other rows than the nearest by ratio."""
    table = {"pallas": {1: 1.0, 100: 9.0}, "scratch": {1: 2.0, 100: 5.0}}
    monkeypatch.setattr(choice, "MILLISECONDS", table)
    assert chosen_on("NVIDIA H200", *operands(rows=9 * GROUPS)) == "pallas"
    assert chosen_on("NVIDIA H200", *operands(rows=11 * GROUPS)) == "scratch"


def test_the_table_has_the_same_rows_for_all():
    assert len({tuple(times) for times in MILLISECONDS.values()}) == 1


def test_auto_is_what_was_chosen(monkeypatch):
    """Fails if the api asks and does not listen."""
    x, weight = operands()
    ran = []
    monkeypatch.setattr(mosaic, "grouped_matmul", lambda x, *_, **__: ran.append("pallas") or x)
    with compiling_for("NVIDIA H200"):
        api.grouped_matmul(x, weight, jnp.array([2, 2], jnp.int32))
    assert ran == ["pallas"]
