"""Two processes of four devices give the losses of one of eight, stop together, and leave a run that
goes on in one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from kimi_jax import Trainer
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.metrics import read_metrics
from tests.unit.support import tiny_run, write_rows, write_tiny_checkpoint

ROOT = Path(__file__).parents[3]
REFERENCE_STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on eight devices."""
    folder = tmp_path_factory.mktemp("processes")
    # One layer: compiling, three times, is what this test costs.
    layers = {"first_k_dense_replace": 0, "num_hidden_layers": 1}
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", n_routed_experts=16, **layers)
    write_rows(folder / "train.jsonl")
    run = tiny_run(
        folder,
        checkpoint,
        lora__targets=["attention", "routed"],
        mesh__expert=8,
        train__micro_batch=8,
        train__accumulate=2,
        train__learning_rate=1e-3,
        train__steps=REFERENCE_STEPS,
        train__checkpoint_every=REFERENCE_STEPS,
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def start(config, run, number, port):
    """One of two processes of four devices, for more steps than anyone waits for."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "kimi_jax.train", "--config", str(config), f"run.dir={run}"]
    command += ["train.steps=1000", "--coordinator", f"localhost:{port}"]
    command += ["--processes", "2", "--process", str(number)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run, step, running, limit=240):
    """Returns when the record has that step; fails if a process ends before."""
    until = time.monotonic() + limit
    while not any(line["step"] >= step for line in read_metrics(run)):
        ended = [process.communicate() for process in running if process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < until
        time.sleep(0.1)


def losses(run):
    return [line["loss"] for line in read_metrics(run) if line["kind"] == "step"]


def steps(trainer, batches, count):
    """Losses of further steps, made in this process on eight devices."""
    found = []
    for _ in range(count):
        micro = [next(batches) for _ in range(trainer.config.train.accumulate)]
        batch = {key: np.stack([each[key] for each in micro]) for key in micro[0]}
        found.append(float(trainer.train_step(batch).loss))
    return found


def test_one_run_on_two_processes_and_one(config, light_compiler):
    """A signal to one process stops both after the same step; what they saved goes on in one."""
    run = config.parent / "two"
    trainer = Trainer(config)
    expected = steps(trainer, trainer.data.batches(), REFERENCE_STEPS)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = [start(config, run, number, port) for number in range(2)]
    try:
        wait_for_step(run, 2, running)
        running[1].send_signal(signal.SIGTERM)
        outcomes = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outcomes
    done = len(losses(run))
    assert f"Stopped by SIGTERM after step {done}, which is saved." in outcomes[0][0]
    assert "step" not in outcomes[1][0]  # one process speaks
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(done)]
    assert json.loads((run / "run.json").read_text())["base_fingerprint"]
    batches = trainer.data.batches()
    with Checkpoints(run, read_only=True) as checkpoints:
        batches.set_state(trainer.restore(checkpoints))
    found = losses(run) + steps(trainer, batches, 2)
    compared = min(len(found), REFERENCE_STEPS)
    assert compared >= 4
    assert found[:compared] == pytest.approx(expected[:compared], rel=1e-5)
