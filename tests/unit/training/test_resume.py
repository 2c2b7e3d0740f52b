"""A run that is stopped or killed, and started again, gives the losses of one that was not: exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from kimi_jax import Trainer, UserError
from kimi_jax.command import run_command
from kimi_jax.config_file import load_config
from kimi_jax.data.loader import Batches
from kimi_jax.train import main
from kimi_jax.training import run_dir
from kimi_jax.training.examples import read_examples
from kimi_jax.training.metrics import Metrics, read_metrics
from tests.unit.support import tiny_run, write_rows

ROOT = Path(__file__).parents[3]
STEPS = 6
# All that a line says and a clock or the process does not.
COMPARED = (
    "kind",
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "trained_weight",
    "expert_load_max_over_mean",
)


@pytest.fixture(scope="module")
def workplace(tiny, tmp_path_factory):
    """A folder with a configuration, rows, and a cache of compiled programs that all runs share."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "train.jsonl")
    held_out = [{"prompt": "Where is the sun?", "completion": "In the sky, it is."}]
    write_rows(folder / "held_out.jsonl", held_out)
    run = tiny_run(
        folder,
        tiny,
        lora__targets=["attention", "routed"],
        data__eval=str(folder / "held_out.jsonl"),
        train__steps=STEPS,
        train__accumulate=2,
        train__warmup_steps=2,
        train__schedule="cosine",
        train__checkpoint_every=2,
        evaluate__loss_every=2,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    return folder


def start(workplace, run, *interruption, overrides=()):
    """Runs the command in a process of its own; `interruption` as `interrupted.py` takes it."""
    module = "tests.unit.training.interrupted" if interruption else "kimi_jax.train"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workplace / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", module, *map(str, interruption)]
    command += ["--config", str(workplace / "config.yaml"), f"run.dir={run}", *overrides]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def lines(run):
    """What two records of the same run must agree in, line by line."""
    return [{key: line.get(key) for key in COMPARED} for line in read_metrics(run)]


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(workplace):
    """The run that nothing happened to. It compiles; the others find what it compiled."""
    run = workplace / "uninterrupted"
    done = start(workplace, run)
    assert done.returncode == 0, done.stderr
    assert f"Done: {STEPS} steps" in done.stdout
    return run


def test_the_record_of_a_run(uninterrupted):
    """Guards lines that are missing or twice there, and the last checkpoint."""
    found = [(line["kind"], line["step"]) for line in lines(uninterrupted)]
    steps = [("step", step) for step in range(1, STEPS + 1)]
    for step in (0, 2, 4, 6):
        place = steps.index(("step", step)) + 1 if step else 0
        steps.insert(place, ("eval", step))
    assert found == steps
    losses = [line["loss"] for line in lines(uninterrupted)]
    assert len(set(losses)) == len(losses)
    assert checkpoints(uninterrupted) == ["4", "6"]
    assert (uninterrupted / "loss.png").stat().st_size > 0
    assert list((uninterrupted / "tensorboard").iterdir())


def test_killed_in_a_step_and_in_a_save(workplace, uninterrupted):
    """Guards invariant 8: SIGKILL at two moments of one run, and the losses are as if never."""
    run = workplace / "killed"
    first = start(workplace, run, "kill-in-save", 4)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert checkpoints(run) == ["2", "4.orbax-checkpoint-tmp"]
    assert lines(run)[-1]["step"] >= 4  # recorded, and lost with the checkpoint
    second = start(workplace, run, "kill-in-step", 5)
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert "Going on after step 2" in second.stdout
    assert checkpoints(run) == ["2", "4"]
    # What a kill may leave of a line that was being written: the next start must not stumble over it.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    last = start(workplace, run)
    assert last.returncode == 0, last.stderr
    assert "Going on after step 4" in last.stdout
    assert lines(run) == lines(uninterrupted)
    assert checkpoints(run) == ["4", "6"]


def test_stopped_by_sigterm(workplace, uninterrupted):
    """Guards a clean stop: saved at once, also between checkpoints and outside a step."""
    run = workplace / "stopped"
    rarely = "train.checkpoint_every=5"
    first = start(workplace, run, "terminate-in-evaluation", 2, overrides=[rarely])
    assert first.returncode == 0, first.stderr
    assert "Stopped by SIGTERM after step 2, which is saved" in first.stdout
    assert checkpoints(run) == ["2"]
    assert lines(run) == [line for line in lines(uninterrupted) if line["step"] <= 2]
    last = start(workplace, run)
    assert last.returncode == 0, last.stderr
    assert "Going on after step 2" in last.stdout
    assert lines(run) == lines(uninterrupted)


def test_a_finished_run_started_again_does_nothing(workplace, uninterrupted, capsys):
    before = {path: path.read_bytes() for path in sorted(uninterrupted.rglob("*.jsonl"))}
    main(["--config", str(workplace / "config.yaml"), f"run.dir={uninterrupted}"])
    assert f"Done: {STEPS} steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert checkpoints(uninterrupted) == ["4", "6"]


def test_what_is_computed_again_may_differ(workplace, uninterrupted):
    """A run that met the end of a GPU's memory goes on with less kept; its rate stays what it was."""
    config = workplace / "config.yaml"
    base = json.loads((uninterrupted / run_dir.FACTS).read_text())["base_fingerprint"]

    def check(*overrides):
        run_dir.check(uninterrupted, load_config(config, list(overrides)), base)

    for changed in ("keep=[stream]", "offload=[latents]", "recompute=none", "keep_checkpoints=7"):
        check(f"train.{changed}")
    with pytest.raises(UserError, match=r"train\.clip_norm: the run has .*, now 7"):
        check("train.clip_norm=7", "train.keep=[stream]")


def test_a_torn_last_line_is_left_out(tmp_path):
    """Guards a record that a kill cut in the midst of a line, and lines of updates that were lost."""
    with Metrics(tmp_path, 0) as metrics:
        for step in (1, 2, 3):
            # An answer may hold characters that end a line elsewhere.
            metrics.write("step", step, loss=float(step), answer="a\u2028b\x85c\r\n")
    whole = read_metrics(tmp_path)
    assert [line["loss"] for line in whole] == [1.0, 2.0, 3.0]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": 4})[:-5])
    assert read_metrics(tmp_path) == whole
    with Metrics(tmp_path, 2) as metrics:
        assert metrics.has("step", 2)
        assert not metrics.has("step", 3)
        metrics.write("step", 3, loss=0.5)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses == [1.0, 2.0, 0.5]


def test_a_damaged_record_is_refused(tmp_path):
    """Guards a record that would be cut short in silence."""
    good = '{"kind": "step", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(good + "#\n" + good)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of a run's record"):
        Metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == good + "#\n" + good


def test_a_step_that_is_not_finite_stops_the_run(workplace, tmp_path, light_compiler, capsys):
    """Guards a run that would go on with NaN: it stops, keeps the batch and the adapters before it."""
    run = tmp_path / "run"
    arguments = ["--config", str(workplace / "config.yaml"), f"run.dir={run}"]
    arguments += ["train.learning_rate=1e30", "train.schedule=constant", "train.warmup_steps=0"]
    arguments += ["evaluate.loss_every=null"]
    with pytest.raises(SystemExit) as exit_code:
        run_command(main, arguments)
    message = capsys.readouterr().err
    assert exit_code.value.code == 3
    assert message.startswith("stopped: step 2 is not finite: loss ")
    assert "the adapters of step 1 are saved" in message
    assert str(run / "nonfinite_step_2.npz") in message
    assert [line["step"] for line in lines(run)] == [1]
    assert checkpoints(run) == ["1"]
    config = load_config(workplace / "config.yaml", arguments[2:])
    trainer = Trainer(config)
    position = trainer.restore()
    assert trainer.step == 1
    assert all(np.isfinite(value).all() for value in trainer.state.adapters.values())
    # Started again, the run would come to the same batch, and to no other.
    examples, _ = read_examples(config, trainer.chat, Console(quiet=True))
    batches = Batches(examples, rows_per_batch=config.train.micro_batch, seed=config.run.seed)
    batches.set_state(position)
    expected = [next(batches) for _ in range(config.train.accumulate)]
    kept = np.load(run / "nonfinite_step_2.npz")
    for key in ("tokens", "loss_weights", "positions", "segment_ids"):
        np.testing.assert_array_equal(kept[key], np.stack([batch[key] for batch in expected]))
