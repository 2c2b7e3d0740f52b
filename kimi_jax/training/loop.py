"""The training loop: batches in, steps, evaluation, checkpoints, and a clean way out."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kimi_jax.config import RunConfig
from kimi_jax.errors import RunStopped
from kimi_jax.parallel import processes
from kimi_jax.training import run_dir
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.data import read_data
from kimi_jax.training.evaluate import look
from kimi_jax.training.lock import hold
from kimi_jax.training.metrics import Metrics, plot_losses
from kimi_jax.training.report import record_step, trainable_table
from kimi_jax.training.session import Session
from kimi_jax.training.step import StepMetrics
from kimi_jax.training.stop import Noted, stop_signals
from kimi_jax.training.trainer import Trainer


class NonFiniteError(RunStopped):
    """The loss or the gradient was not finite; the batch is kept in a file that the message names."""


def run(config: RunConfig, console: Console) -> None:
    """Runs, or goes on with, the run of `config` to its last step.

    All processes of a run call it. The first one writes, but for checkpoints, to which each adds
    what it holds; `run.dir` must be one directory for all of them.

    Raises:
        UserError: anything wrong in configuration, checkpoint, data or run directory, before a step.
        NonFiniteError: a loss or gradient that is not finite; everything saved before it is kept.
    """
    directory = Path(config.run.dir)
    trainer = Trainer(config)
    for reason, count in trainer.checkpoint.left_aside.items():
        console.print(f"{config.model.checkpoint}: {count} tensors left aside: {reason}")
    data = read_data(config, trainer.chat, console)
    processes.wait_for_all("rows are read")
    resumed = processes.on_first(
        lambda: run_dir.prepare(directory, config, trainer.base_fingerprint)
    )
    console.print(trainable_table(trainer.checkpoint.table, trainer.plan))
    batches = data.batches()
    with ExitStack() as stack:
        held = processes.on_first(lambda: stack.enter_context(hold(directory)))
        checkpoints = stack.enter_context(Checkpoints(directory, config.train.keep_checkpoints))
        if not held:
            console.print(f"{directory}: its file system has no locks; let one run write here.")
        if resumed and checkpoints.latest is not None:
            data_state = trainer.restore(checkpoints)
            if data_state:
                batches.set_state(data_state)
            console.print(f"Going on after step {trainer.step} of {directory}.")
        if resumed:
            processes.on_first(lambda: run_dir.record_config(directory, config))
        with _import_progress(console) as progress:
            trainer.import_base(progress)
        processes.wait_for_all("weights are imported")
        with Metrics(directory, trainer.step) as metrics:
            session = Session(
                trainer, config, directory, data.held_out, batches, checkpoints, metrics, console
            )
            _run_steps(session)
    path = processes.on_first(lambda: str(plot_losses(directory)))
    if session.stop:
        console.print(
            f"Stopped by {session.stop} after step {trainer.step}, which is saved. "
            "The same command goes on from there."
        )
    else:
        console.print(f"Done: {trainer.step} steps in {directory}, loss curve in {path}.")


def _run_steps(session: Session) -> None:
    trainer, settings = session.trainer, session.config.train
    with stop_signals() as noted, _step_progress(session) as progress:
        task = progress.add_task("training", total=settings.steps, completed=trainer.step)
        look(session)
        while trainer.step < settings.steps and not _stopping(session, noted):
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
            if not _stopping(session, noted):
                look(session)
        _save(session, session.batches.get_state())  # a signal may have come at any time
        session.checkpoints.wait()


def _stopping(session: Session, noted: Noted) -> bool:
    """Whether a signal has come to any process. All ask together, so that all stop after one step."""
    number = processes.largest(noted.number)
    if number:
        session.stop = signal.Signals(number).name
    return number > 0


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
    processes.on_first(lambda: np.savez_compressed(path, allow_pickle=False, **batch))
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
    """A bar with bytes, bytes a second and the time left; where there is no terminal, one line."""
    began, last = time.perf_counter(), 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("importing weights", total=None)

        def update(done: int, total: int) -> None:
            nonlocal last
            last = done
            progress.update(task, completed=done, total=total)

        yield update
    seconds = time.perf_counter() - began
    each = " in each process" if processes.count() > 1 else ""
    console.print(
        f"Imported {last / 1e9:,.2f} GB of weights{each} in {seconds:,.1f} s, "
        f"{last / 1e9 / seconds:,.2f} GB/s.",
        highlight=False,
    )
