"""What the parts of the training loop share."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kimi_jax.config import RunConfig
from kimi_jax.data.loader import Batches
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.data import RunData
from kimi_jax.training.metrics import Metrics
from kimi_jax.training.trainer import Trainer


@dataclass
class Session:
    """One process's part of a run."""

    trainer: Trainer
    config: RunConfig
    directory: Path
    data: RunData
    batches: Batches
    checkpoints: Checkpoints
    metrics: Metrics
    console: Console
    stop: str | None = None  # name of the signal for which all processes stop, once one has come
