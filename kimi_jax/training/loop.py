"""The training loop: batches in, steps, evaluation, checkpoints, and a clean way out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_jax.config import RunConfig
from kimi_jax.data.loader import Batches
from kimi_jax.errors import RunStopped
from kimi_jax.training import run_dir
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.evaluate import look
from kimi_jax.training.examples import read_examples
from kimi_jax.training.lock import hold
from kimi_jax.training.metrics import Metrics, plot_losses
from kimi_jax.training.report import record_step, trainable_table
from kimi_jax.training.session import Session
from kimi_jax.training.step import StepMetrics
from kimi_jax.training.stop import stop_signals
from kimi_jax.training.trainer import Trainer


class NonFiniteError(RunStopped):
    """The loss or the gradient was not finite; the batch is kept in a file that the message names."""


def run(config: RunConfig, console: Console) -> None:
    """Runs, or goes on with, the run of `config` to its last step.

    Raises:
        UserError: anything wrong in configuration, checkpoint, data or run directory, before a step.
        NonFiniteError: a loss or gradient that is not finite; everything saved before it is kept.
    """
    directory = Path(config.run.dir)
    trainer = Trainer(config)
    for reason, count in trainer.checkpoint.left_aside.items():
        console.print(f"{config.model.checkpoint}: {count} tensors left aside: {reason}")
    train, held_out = read_examples(config, trainer.chat, console)
    resumed = run_dir.prepare(directory, config, trainer.base_fingerprint)
    console.print(trainable_table(trainer.checkpoint.table, trainer.plan))
    batches = Batches(
        train,
        rows_per_batch=config.train.micro_batch,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        pack=config.data.pack,
    )
    with (
        hold(directory) as held,
        Checkpoints(directory, config.train.keep_checkpoints) as checkpoints,
    ):
        if not held:
            console.print(f"{directory}: its file system has no locks; let one process write here.")
        if resumed and checkpoints.latest is not None:
            data_state = trainer.restore(checkpoints)
            if data_state:
                batches.set_state(data_state)
            console.print(f"Going on after step {trainer.step} of {directory}.")
        if resumed:
            run_dir.record_config(directory, config)
        with _import_progress(console) as progress:
            trainer.import_base(progress)
        with Metrics(directory, trainer.step) as metrics:
            session = Session(
                trainer, config, directory, held_out, batches, checkpoints, metrics, console
            )
            _run_steps(session)
    path = plot_losses(directory)
    if session.stop:
        console.print(
            f"Stopped by {session.stop['signal']} after step {trainer.step}, which is saved. "
            "The same command goes on from there."
        )
    else:
        console.print(f"Done: {trainer.step} steps in {directory}, loss curve in {path}.")


def _run_steps(session: Session) -> None:
    trainer, settings = session.trainer, session.config.train
    with stop_signals(session.stop), _step_progress(session) as progress:
        task = progress.add_task("training", total=settings.steps, completed=trainer.step)
        look(session)
        while trainer.step < settings.steps and not session.stop:
            began = time.perf_counter()
            before = session.batches.get_state()
            batch = _next_batch(session)
            rate = trainer.learning_rate()
            metrics = trainer.train_step(batch)
            if not bool(metrics.finite):
                raise _not_finite(session, metrics, batch, before)
            record_step(session, metrics, batch, rate, time.perf_counter() - began)
            progress.update(task, completed=trainer.step)
            last = trainer.step == settings.steps
            if last or trainer.step % settings.checkpoint_every == 0:
                _save(session, session.batches.get_state())
            look(session)
        _save(session, session.batches.get_state())  # a signal may have come at any time
        session.checkpoints.wait()


def _save(session: Session, data_state: dict[str, Any]) -> None:
    if session.trainer.step > (session.checkpoints.latest or 0):
        session.checkpoints.save(session.trainer.state, data_state)


def _next_batch(session: Session) -> dict[str, np.ndarray]:
    """Micro-batches of one step, stacked: every field [accumulate, B, T]."""
    micro = [next(session.batches) for _ in range(session.config.train.accumulate)]
    return {key: np.stack([batch[key] for batch in micro]) for key in micro[0]}


def _not_finite(
    session: Session, metrics: StepMetrics, batch: dict[str, np.ndarray], before: dict[str, Any]
) -> NonFiniteError:
    """Keeps the batch, and the state before it with the data position before it."""
    done = session.trainer.step
    path = session.directory / f"nonfinite_step_{done + 1}.npz"
    np.savez_compressed(path, allow_pickle=False, **batch)
    _save(session, before)
    session.checkpoints.wait()
    reason = (
        "no token of its batch has a loss weight"
        if float(metrics.weight_sum) == 0
        else f"loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}"
    )
    kept = f"the adapters of step {done} are saved" if done else "no step was made before it"
    return NonFiniteError(
        f"step {done + 1} is not finite: {reason}. The batch is in {path}; {kept}. Look at the batch "
        "first; then a smaller train.learning_rate, or model.dtype=float32, in a new run.dir may help."
    )


def _step_progress(session: Session) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=session.console,
        disable=not session.console.is_terminal,
    )


@contextmanager
def _import_progress(console: Console) -> Iterator[Any]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("importing weights", total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update
