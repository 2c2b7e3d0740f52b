"""Runs that cannot fit are refused with the plan's numbers and what to change."""

import pytest

from kimi_jax.errors import UserError
from kimi_jax.parallel.ranks import abstract_ranks
from kimi_jax.planning import check_fits, device_memory, plan

GIB = 2**30


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def refusal(config, model, memory):
    with pytest.raises(UserError) as caught:
        check_fits(config, model, abstract_ranks(config.mesh), memory)
    return str(caught.value)


def test_a_run_that_fits(on_eight, model):
    config = on_eight()
    check_fits(config, model, abstract_ranks(config.mesh), plan(config).program)


def test_a_batch_too_large(on_eight, model):
    config = on_eight("train.micro_batch=320")
    message = refusal(config, model, 130 * GIB)
    assert "JAX may use on each device 130.0 GiB" in message
    assert "packed experts: 59.06 GiB" in message
    assert "train.micro_batch=" in message
    found = int(message.split("train.micro_batch=")[1].split(" ")[0])
    smaller = on_eight(f"train.micro_batch={found}")
    check_fits(smaller, model, abstract_ranks(smaller.mesh), 130 * GIB)


def test_what_is_offered(on_eight, model):
    config = on_eight("train.recompute=none", "mesh.rest=replicated")
    message = refusal(config, model, 90 * GIB)
    assert "train.recompute=layer (" in message
    assert "mesh.rest=sharded (" in message
    assert "lora.expert_factors=shared" in message
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in message
    # What is done already is not offered.
    message = refusal(on_eight("lora.expert_factors=shared"), model, 80 * GIB)
    assert "recompute" not in message
    assert "rest=" not in message
    assert "expert_factors" not in message


def test_on_cpus_what_stands_is_compared_with_the_machine(on_eight, model, monkeypatch):
    config = on_eight()
    ranks = abstract_ranks(config.mesh)
    kinds = ("weights", "training")
    standing = sum(item.bytes for item in plan(config).items if item.kind in kinds)
    monkeypatch.setattr("kimi_jax.planning.fits.host_memory", lambda: standing)
    check_fits(config, model, ranks, None)
    monkeypatch.setattr("kimi_jax.planning.fits.host_memory", lambda: 8 * standing - 1)
    with pytest.raises(UserError, match="this machine has"):
        check_fits(config, model, ranks, None, local=8)


def test_device_memory():
    limited = [Device({"bytes_limit": 7}), Device({"bytes_limit": 5})]
    assert device_memory(limited) == 5
    assert device_memory([*limited, Device(None)]) is None
    assert device_memory([Device({})]) is None
