"""Several processes: how they are found, what they exchange, and that settings by half are refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_jax.errors import UserError
from kimi_jax.parallel import processes
from kimi_jax.parallel.processes import Settings
from tests.unit.support import write_tiny_checkpoint

ROOT = Path(__file__).parents[3]
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX")


@pytest.fixture
def started(monkeypatch):
    """Calls of `jax.distributed.initialize`, which is not made; no launcher's variables."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(
        processes.jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    updates = []
    monkeypatch.setattr(processes.jax.config, "update", lambda *a: updates.append(a))
    calls_and_updates = (calls, updates)
    return calls_and_updates


def refusal(given=processes.NOTHING_GIVEN):
    with pytest.raises(UserError) as caught:
        processes.start(given)
    return str(caught.value)


def slurm(monkeypatch, tasks, per_node):
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    for name in names:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", per_node)


def test_one_process_starts_nothing(started, monkeypatch):
    calls, _ = started
    processes.start()
    processes.start(Settings(processes=1))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    processes.start()
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    slurm(monkeypatch, tasks=1, per_node="1")
    processes.start()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    processes.start()
    assert calls == []


def test_settings_by_options_and_variables(started, monkeypatch):
    """Options win, one by one; what another launcher says is not asked."""
    calls, _ = started
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "left:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    processes.start(Settings(coordinator="right:2"))
    ((arguments, keywords),) = calls
    assert arguments == ("right:2", 3, 2)
    assert keywords["cluster_detection_method"] == "deactivate"


def test_half_given_settings(started):
    found = refusal(Settings(coordinator="node0:1234"))
    assert "only a part of their settings is given" in found
    assert "--processes (or JAX_NUM_PROCESSES)" in found
    assert "--process (or JAX_PROCESS_ID)" in found
    assert "--coordinator" not in found
    assert started[0] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Settings("node0", 2, 0), "--coordinator node0: required: HOST:PORT"),
        (Settings("node0:1", 2, 2), "--process 2: required: from 0 to 1"),
        (Settings("node0:1", 0, 0), "--processes 0: required: at least 1"),
    ],
)
def test_impossible_settings(started, given, said):
    assert said in refusal(given)


def test_a_number_that_is_none(started, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert "JAX_NUM_PROCESSES and JAX_PROCESS_ID: required: whole numbers" in refusal()


@pytest.mark.parametrize(("per_node", "all_gpus"), [("1(x2)", True), ("2", False), ("2,1", False)])
def test_slurm_is_left_to_jax(started, monkeypatch, per_node, all_gpus):
    """One process a node must get the node's GPUs: JAX alone would give it the first."""
    calls, updates = started
    slurm(monkeypatch, tasks=2, per_node=per_node)
    processes.start()
    ((arguments, keywords),) = calls
    assert arguments == (None, None, None)
    assert keywords["cluster_detection_method"] is None
    assert (("jax_cuda_visible_devices", "all") in updates) == all_gpus


def test_a_start_that_fails_says_how_to_mend_it(started, monkeypatch):
    def fail(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", fail)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    found = refusal()
    assert found.startswith("Kubernetes: the start failed: coordinator_address should be defined.")
    assert "the package `kubernetes`" in found


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes(tmp_path):
    """Four simulated devices each: exchanges, rows, and an import of which each reads its half."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", n_routed_experts=16)
    address = f"localhost:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.unit.parallel.two_processes",
                str(number),
                address,
                checkpoint,
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outcomes = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], outcomes
    found = []
    for out, _ in outcomes:
        (line,) = [line for line in out.splitlines() if "found {" in line]
        found.append(json.loads(line[line.index("{") :]))
    first, second = found
    assert [each["first"] for each in found] == [True, False]
    assert [each["calls"] for each in found] == [1, 0]
    assert [each["refusal"] for each in found] == [
        "the directory is full",
        "on process 0: the directory is full",
    ]
    for each in found:
        assert each["devices"] == 8
        assert each["value"] == [0, "ä"]
        assert each["largest"] == 15
        assert each["on_this_machine"] == 2
        assert each["whole"]
        assert each["differ"] == []
    assert first["rows_here"] == [0, 3, 6, 9]
    assert second["rows_here"] == [12, 15, 18, 21]
    # Vectors are on every device; all else is read by one of the two.
    assert first["read"] == second["read"]
    assert first["total"] < 2 * first["read"] < 1.02 * first["total"]


def test_a_failure_ends_one_of_several_at_once(monkeypatch, capsys):
    """Guards the wait for others that wait for this one: exit without the barrier at the end."""
    left = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes.os, "_exit", left.append)
    with processes.ended_together(lambda error: len(str(error))):
        raise UserError("four")
    assert left == [4]
    assert "of 2 ends the run:" in capsys.readouterr().err
    monkeypatch.setattr(processes, "count", lambda: 1)
    with pytest.raises(UserError), processes.ended_together(lambda _: 0):
        raise UserError("one process goes the ordinary way")
    assert left == [4]
