"""`python -m tests.unit.training.interrupted HOW STEP …`: the train command, ended in the midst of it.

HOW: `kill-in-step` sends SIGKILL when update STEP has been computed and not yet been recorded,
earlier checkpoints being whole; `kill-in-save` when the checkpoint of STEP is written beside its
final name and not yet renamed; `terminate-in-evaluation` sends SIGTERM in the midst of the held-out
loss after STEP. The other arguments are the command's.
"""

import os
import signal
import sys
from pathlib import Path

from kimi_jax.command import run_command
from kimi_jax.train import main
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.trainer import Trainer


def _interrupt_step(step):
    original, original_save = Trainer.train_step, Checkpoints.save

    def save(self, state, data_state):
        original_save(self, state, data_state)
        self.wait()

    def train_step(self, batch, after=None):
        metrics = original(self, batch, after)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    Trainer.train_step = train_step
    Checkpoints.save = save


def _interrupt_evaluation(step):
    original = Trainer.evaluate

    def evaluate(self, batches):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    Trainer.evaluate = evaluate


def _interrupt_rename(step):
    original = os.rename

    def rename(source, target, **options):
        if Path(target).name == str(step) and Path(target).parent.name == "checkpoints":
            assert Path(source).is_dir()
            assert not Path(target).exists()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(source, target, **options)

    os.rename = rename


if __name__ == "__main__":
    how, step = sys.argv[1], int(sys.argv[2])
    place = {
        "kill-in-step": _interrupt_step,
        "kill-in-save": _interrupt_rename,
        "terminate-in-evaluation": _interrupt_evaluation,
    }[how]
    place(step)
    run_command(main, sys.argv[3:])
