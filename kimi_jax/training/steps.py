"""The steps of a run: each is handed to the devices before the figures of the one before are read.

So devices never wait for the host, which prepares step n + 1 while they compute step n. What must be
of one moment, a checkpoint, an evaluation or the end, comes with no step in flight.
"""

import time
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.errors import RunStopped
from kimi_jax.parallel import processes
from kimi_jax.training.optimizer import learning_rates
from kimi_jax.training.report import record_step
from kimi_jax.training.session import Session
from kimi_jax.training.step import StepMetrics


class NonFiniteError(RunStopped):
    """The loss or the gradient was not finite; the batch is kept in a file that the message names."""


class Flight(NamedTuple):
    """A step that was dispatched and of which nothing has been read.

    Attributes:
        number: updates made with it.
        metrics: on the devices, or still to be computed.
        rate: its learning rate, likewise.
        batch: its micro-batches, stacked.
        before: data position before them.
        began: when the host set to work on it, in seconds of `time.perf_counter`.
    """

    number: int
    metrics: StepMetrics
    rate: Any
    batch: dict[str, np.ndarray]
    before: dict[str, Any]
    began: float


class Steps:
    """Makes steps, of which at most one is in flight when a method returns."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rates = learning_rates(session.config.train)
        self._flight: Flight | None = None
        self._completed = 0.0
        # Counted here: to ask the trainer would be to wait for the devices.
        self.made = self.recorded = session.trainer.step

    @property
    def idle(self) -> bool:
        """Whether no step is in flight."""
        return self._flight is None

    def dispatch(self) -> None:
        """Hands the next step to the devices, then waits for the one before it and records that.

        Raises:
            NonFiniteError: the one before was not finite. The step just handed over has then changed
                nothing, because it was told on the devices (`after`): state and data position that
                are kept are those before the bad step.
        """
        began, before = time.perf_counter(), self._session.batches.get_state()
        batch = _next_batch(self._session)
        # Computed behind the step in flight, like the step itself, and read with its figures.
        rate = self._rates(self.made)
        previous = self._flight
        after = None if previous is None else previous.metrics
        metrics = self._session.trainer.train_step(batch, after)
        for value in metrics:
            value.copy_to_host_async()
        self.made += 1
        self._flight = Flight(self.made, metrics, rate, batch, before, began)
        if previous is not None:
            self._record(previous)

    def drain(self) -> None:
        """Waits for the step in flight, if there is one, and records it.

        Raises:
            NonFiniteError: it was not finite.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            self._record(flight)

    def _record(self, flight: Flight) -> None:
        metrics, rate = processes.to_host((flight.metrics, flight.rate))
        completed = time.perf_counter()
        if not metrics.finite:
            raise _not_finite(self._session, flight, metrics)
        # From one completion to the next; the first after a pause counts from its preparation.
        seconds = completed - max(flight.began, self._completed)
        self._completed = completed
        record_step(self._session, flight.number, metrics, flight.batch, float(rate), seconds)
        self.recorded = flight.number


def save(session: Session, data_state: dict[str, Any]) -> None:
    """Saves the trainer's state with this data position, unless that is done. No step is in flight."""
    if session.trainer.step > (session.checkpoints.latest or 0):
        session.checkpoints.save(session.trainer.state, data_state)


def _next_batch(session: Session) -> dict[str, np.ndarray]:
    """Micro-batches of one step, stacked: every field [accumulate, B, T]."""
    micro = [next(session.batches) for _ in range(session.config.train.accumulate)]
    return {key: np.stack([batch[key] for batch in micro]) for key in micro[0]}


def _not_finite(session: Session, flight: Flight, metrics: StepMetrics) -> NonFiniteError:
    """Keeps the batch, and the state before it with the data position before it."""
    done = flight.number - 1
    assert session.trainer.step == done, "a step behind one that was not finite changed the state"
    path = session.directory / f"nonfinite_step_{flight.number}.npz"
    processes.on_first(lambda: np.savez_compressed(path, allow_pickle=False, **flight.batch))
    save(session, flight.before)
    session.checkpoints.wait()
    reason = (
        "no token of its batch has a loss weight"
        if float(metrics.weight_sum) == 0
        else f"loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}"
    )
    kept = f"the adapters of step {done} are saved" if done else "no step was made before it"
    return NonFiniteError(
        f"step {flight.number} is not finite: {reason}. The batch is in {path}; {kept}. Look at the "
        "batch first; then a smaller train.learning_rate, or model.dtype=float32, in a new run.dir "
        "may help."
    )
