"""A run's rows as a loop wants them: endless training batches, and held-out batches and questions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32
from rich.console import Console

from kimi_jax.config import RunConfig
from kimi_jax.console import make_console
from kimi_jax.data.chat import Chat
from kimi_jax.data.examples import Examples
from kimi_jax.data.loader import Batches, held_out_batches
from kimi_jax.data.packing import Batch
from kimi_jax.errors import UserError
from kimi_jax.training.examples import read_examples


@dataclass(frozen=True)
class RunData:
    """Checked rows of `data.train` and, if the run has it, `data.eval`."""

    config: RunConfig
    train: Examples
    held_out: Examples | None

    def batches(self) -> Batches:
        """Endless training batches of `train.micro_batch` rows, those of a run of this configuration."""
        return Batches(
            self.train,
            rows_per_batch=self.config.train.micro_batch,
            seed=self.config.run.seed,
            shuffle=self.config.data.shuffle,
            pack=self.config.data.pack,
        )

    def held_out_batches(self) -> list[Batch]:
        """Every held-out row once, in order, for `Trainer.evaluate`."""
        return list(
            held_out_batches(
                self._held_out(),
                rows_per_batch=self.config.train.micro_batch,
                pack=self.config.data.pack,
            )
        )

    def questions(self) -> list[str]:
        """The user's last words before each held-out answer, to show."""
        held_out = self._held_out()
        return [held_out.question(index) for index in range(len(held_out))]

    def prompts(self) -> list[Int32[np.ndarray, " T"]]:
        """Tokens of each held-out row up to its answer, for `Trainer.sample`."""
        held_out = self._held_out()
        return [held_out.prompt(index) for index in range(len(held_out))]

    def _held_out(self) -> Examples:
        if self.held_out is None:
            raise UserError("held-out rows are asked for: set data.eval to a JSONL file")
        return self.held_out


def read_data(config: RunConfig, chat: Chat, console: Console | None = None) -> RunData:
    """Reads, checks and measures the rows of a run, and prints what was found.

    Raises:
        UserError: rows that cannot be used, all of them listed.
    """
    return RunData(config, *read_examples(config, chat, console or make_console()))
