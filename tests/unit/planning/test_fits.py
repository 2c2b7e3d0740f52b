"""Runs that cannot fit are refused with the plan's numbers and what to change."""

import os

import pytest

from kimi_jax import memory_settings
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
    assert "train.keep=[]" in refusal(on_eight("train.keep=[stream]"), model, 80 * GIB)
    # What is done already is not offered.
    message = refusal(on_eight("lora.expert_factors=shared"), model, 80 * GIB)
    assert "recompute" not in message
    assert "train.keep" not in message
    assert "rest=" not in message
    assert "expert_factors" not in message


@pytest.fixture
def machine(monkeypatch):
    """`machine(bytes)` has that much memory, and JAX may use all of it in each process."""
    monkeypatch.setenv(memory_settings.HOST_SETTING, "100000")

    def has(memory):
        monkeypatch.setattr(memory_settings, "host_memory", lambda: memory)
        monkeypatch.setattr("kimi_jax.planning.fits.host_memory", lambda: memory)

    return has


@pytest.mark.parametrize(("local", "processes"), [(8, 1), (1, 8)])
def test_what_is_offloaded_must_fit_the_machine(on_eight, model, machine, local, processes):
    """Of all devices of all processes that share it."""
    config = on_eight("train.offload=[attention]")
    found, ranks = plan(config), abstract_ranks(config.mesh)
    machine(8 * found.host)
    check_fits(config, model, ranks, found.program, local, processes)
    machine(8 * found.host - 1)
    with pytest.raises(UserError, match=r"8 devices would keep (.|\n)*attention: .* GiB") as caught:
        check_fits(config, model, ranks, found.program, local, processes)
    assert memory_settings.HOST_SETTING in str(caught.value)


def test_what_jax_may_use_of_the_machine(on_eight, model, machine, monkeypatch):
    """Its own limit is 64 GiB a process."""
    config = on_eight("train.offload=[attention]")
    found, ranks = plan(config), abstract_ranks(config.mesh)
    monkeypatch.delenv(memory_settings.HOST_SETTING)
    machine(100 * found.host)
    check_fits(config, model, ranks, found.program, local=1)
    check_fits(config, model, ranks, found.program, local=1, processes=80)
    with pytest.raises(UserError, match=r"may use 64\.0 GiB"):
        check_fits(config, model, ranks, found.program, local=80)


def test_what_jax_is_told(machine, monkeypatch):
    """Before it sees a device; what the environment says already wins."""
    machine(500 << 30)
    names = memory_settings.FRACTION_SETTING, memory_settings.HOST_SETTING
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    memory_settings.allow_jax_memory()
    assert [os.environ[name] for name in names] == ["0.92", "500"]
    monkeypatch.setenv(memory_settings.HOST_SETTING, "7")
    memory_settings.allow_jax_memory(0.5)
    assert [os.environ[name] for name in names] == ["0.92", "7"]
    assert memory_settings.allowed_host_memory() == 7 << 30
    monkeypatch.setenv(memory_settings.HOST_SETTING, "much")
    with pytest.raises(UserError, match="is 'much'; required: whole GB"):
        memory_settings.allowed_host_memory()


def test_a_container_has_what_it_may_use(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory_settings, "_CGROUP", limit)
    whole = memory_settings.host_memory()
    limit.write_text("max\n")
    assert memory_settings.host_memory() == whole
    limit.write_text("1048576\n")
    assert memory_settings.host_memory() == 1 << 20


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
