"""Run and output directories in the wrong state: refused, and nothing in them is lost."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from kimi_jax import Trainer, export, generate
from kimi_jax.training.lock import hold
from tests.unit.support import change_json, write_rows


def test_a_directory_of_something_else(place, training_refused):
    place.run.mkdir()
    (place.run / "thesis.txt").write_text("all of it")
    message = training_refused()
    assert f"{place.run}: not empty and not a run directory (no config.yaml)" in message


def test_a_file_for_a_run_directory(place, training_refused):
    place.run.write_text("a file")
    assert f"{place.run}: is a file; set run.dir to a new directory" in training_refused()
    below = place.run / "deeper"
    message = training_refused(f"run.dir={below}")
    assert f"{below}: cannot be made: Not a directory; set run.dir" in message


def test_a_run_of_another_configuration(place_with_run, training_refused):
    message = training_refused("train.learning_rate=5e-3", "lora.rank=4", "run.seed=9")
    assert f"{place_with_run.run}: holds a run of another configuration" in message
    for change in (
        "train.learning_rate: the run has 0.01, now 0.005",
        "lora.rank: the run has 2, now 4",
        "run.seed: the run has 3, now 9",
    ):
        assert change in message
    assert "set run.dir to a new directory" in message


def test_a_run_on_another_base(place_with_run, training_refused, refused):
    change_json(place_with_run.checkpoint / "config.json", lambda raw: raw.update(rope_theta=9.0))
    assert "this run trained on another base (fingerprint " in training_refused()
    out = place_with_run.folder / "out"
    message = refused(export, "--run", place_with_run.run, "--format", "peft", "--out", out)
    assert "this run trained on another base" in message
    assert not out.exists()


def test_a_run_that_another_process_writes(place_with_run, training_refused):
    config = place_with_run.run / "config.yaml"
    before = config.read_bytes()
    with hold(place_with_run.run) as held:
        assert held
        # An override that a run may go on with: it must not reach the file of the one that writes.
        message = training_refused("evaluate.samples=3")
        assert f"{place_with_run.run}: another process is writing this run" in message
    assert config.read_bytes() == before


def test_a_damaged_run(place_with_run, training_refused):
    (place_with_run.run / "run.json").write_text("{")
    assert "run.json: not readable" in training_refused()
    (place_with_run.run / "config.yaml").write_text("train: {steps: 4}")
    message = training_refused()
    assert "run/config.yaml" in message
    assert "lora: missing" in message


def test_other_rows_than_the_runs(place, training_refused):
    """The saved position in the data means nothing in another file."""
    trainer = Trainer(place.settings)
    trainer.save()
    # As `train` saves it, with the position in the rows.
    from kimi_jax.data.examples import Examples
    from kimi_jax.data.loader import Batches
    from kimi_jax.data.rows import JsonlRows
    from kimi_jax.training.checkpoint import Checkpoints

    examples = Examples(JsonlRows(place.rows), trainer.chat, 48)
    position = Batches(examples, rows_per_batch=2, seed=3).get_state()
    trainer.state = trainer.state._replace(step=jnp.int32(1))
    with Checkpoints(place.run) as checkpoints:
        checkpoints.save(trainer.state, position)
    write_rows(place.rows, [{"prompt": "Who sings?", "completion": "The frog."}])
    message = training_refused()
    assert "The saved position belongs to other data or settings" in message
    assert "examples: was " in message


FORMATS = ("peft", "peft-fused", "merged-int4", "merged-bf16")


@pytest.mark.parametrize("format", FORMATS)
def test_an_output_directory_in_use(place_with_run, refused, format):
    out = place_with_run.folder / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("of another run")
    before = place_with_run.contents()
    message = refused(export, "--run", place_with_run.run, "--format", format, "--out", out)
    assert f"{out}: not empty; nothing in it was touched" in message
    assert place_with_run.contents() == before


def test_a_file_for_an_output_directory(place_with_run, refused):
    out = place_with_run.folder / "out"
    out.write_text("a file")
    message = refused(export, "--run", place_with_run.run, "--format", "peft", "--out", out)
    assert f"{out}: is a file; required: a new or empty directory" in message
    assert out.read_text() == "a file"


def test_an_unknown_format(place_with_run, refused):
    message = refused(export, "--run", place_with_run.run, "--format", "gguf", "--out", "out")
    assert "invalid choice: 'gguf'" in message
    assert all(format in message for format in FORMATS)


def test_a_run_without_a_checkpoint(place, refused):
    """As while a run makes its first steps, or when it was killed in them."""
    Trainer(place.settings).save()
    for path in sorted((place.run / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    before = place.contents()
    for _ in ("empty", "absent"):
        out = place.folder / "out"
        message = refused(export, "--run", place.run, "--format", "peft", "--out", out)
        assert "checkpoints: no checkpoint has been saved yet; train.checkpoint_every" in message
        message = refused(generate, "--run", place.run, "--prompt", "Hi")
        assert "no checkpoint has been saved yet" in message
        assert not out.exists()
        assert place.contents() == before
        if (place.run / "checkpoints").is_dir():
            (place.run / "checkpoints").rmdir()
    assert not (place.run / "checkpoints").exists()


def test_what_is_no_run(place, refused):
    for run in (place.folder / "absent", place.checkpoint):
        message = refused(export, "--run", run, "--format", "peft", "--out", place.folder / "out")
        assert f"{run}: not a run directory: config.yaml is not there" in message


def test_an_adapter_that_is_not_finite(place, refused):
    trainer = Trainer(place.settings)
    broken = trainer.state.adapters["lm_head.lora_A"].at[0, 0].set(jnp.nan)
    adapters = {**trainer.state.adapters, "lm_head.lora_A": broken}
    trainer.state = trainer.state._replace(adapters=adapters)
    trainer.save()
    for format in ("peft", "merged-int4"):
        out = place.folder / format
        message = refused(export, "--run", place.run, "--format", format, "--out", out)
        assert "lm_head.lora_A: holds NaN or infinity" in message
        assert not out.exists()


def test_as_a_process(place_with_run):
    """Guards what a shell sees: the exit code, and a message that is the last line, alone."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "kimi_jax.train", "--config", str(place_with_run.config)]
    done = subprocess.run(
        [*command, "lora.rank=4"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "lora.rank: the run has 2, now 4" in done.stderr
    assert "Traceback" not in done.stderr
