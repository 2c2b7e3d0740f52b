"""The training loop: batches in, steps, evaluation, checkpoints, and a clean way out."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
from kimi_jax.parallel import processes
from kimi_jax.training import run_dir
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.data import read_data
from kimi_jax.training.evaluate import due, look
from kimi_jax.training.lock import hold
from kimi_jax.training.metrics import Metrics, plot_losses
from kimi_jax.training.report import trainable_table
from kimi_jax.training.session import Session
from kimi_jax.training.steps import Steps, save
from kimi_jax.training.stop import stop_signals
from kimi_jax.training.trainer import Trainer


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
                trainer, config, directory, data, batches, checkpoints, metrics, console
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
    settings, every = session.config.train, session.config.train.checkpoint_every
    with stop_signals() as noted, _step_progress(session) as progress:
        steps = Steps(session)
        task = progress.add_task("training", total=settings.steps, completed=steps.made)
        look(session)
        while steps.made < settings.steps and session.stop is None:
            # Asked ahead of the step to come, answered behind it: no exchange waits for that step.
            asked = noted.ask()
            if steps.idle and _stopping(session, asked):
                break
            steps.dispatch()
            saving = steps.made == settings.steps or steps.made % every == 0
            if saving or due(session, steps.made):
                steps.drain()
                if saving:
                    save(session, session.batches.get_state())
                if not _stopping(session, noted.ask()):
                    look(session)
            else:
                _stopping(session, asked)
            progress.update(task, completed=steps.recorded)
        steps.drain()
        save(session, session.batches.get_state())  # a signal may have come at any time
        session.checkpoints.wait()


def _stopping(session: Session, asked: Callable[[], int]) -> bool:
    """Whether a signal has come to any process. All ask together, so that all stop after one step."""
    number = asked()
    if number:
        session.stop = signal.Signals(number).name
    return number > 0


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
