"""Held-out loss and sampled answers, at their intervals."""

import math
import re
from typing import Any

from rich.table import Table

from kimi_jax.data.loader import held_out_batches
from kimi_jax.errors import RunStopped
from kimi_jax.training import run_dir
from kimi_jax.training.session import Session


def look(session: Session) -> None:
    """Held-out loss and sampled answers where they are due: at their intervals, first and last."""
    step, settings = session.trainer.step, session.config.evaluate
    if session.held_out is None or session.stop:
        return

    def due(every: int | None, kind: str) -> bool:
        if every is None or session.metrics.has(kind, step):
            return False
        return step % every == 0 or step == session.config.train.steps

    if due(settings.loss_every, "eval"):
        rows = session.config.train.micro_batch
        batches = held_out_batches(
            session.held_out, rows_per_batch=rows, pack=session.config.data.pack
        )
        loss = session.trainer.evaluate(list(batches))["loss"]
        if not math.isfinite(loss):
            raise RunStopped(
                f"the held-out loss after step {step} is {loss}; look at the rows of data.eval first"
            )
        session.metrics.write("eval", step, loss=loss)
        session.console.print(f"step {step} · held-out loss {loss:.4f}", highlight=False)
    if due(settings.sample_every, "sample"):
        _sample(session)


def _sample(session: Session) -> None:
    assert session.held_out is not None
    step, settings = session.trainer.step, session.config.evaluate
    chosen = range(min(settings.samples, len(session.held_out)))
    prompts = [session.held_out.prompt(index) for index in chosen]
    answers = session.trainer.sample(prompts, settings.max_new_tokens)
    pairs = [
        {"prompt": session.held_out.question(index), "answer": text}
        for index, text in zip(chosen, answers, strict=True)
    ]
    values: dict[str, Any] = {"answers": pairs}
    title = f"answers after step {step}"
    if settings.pattern is not None:
        matching = sum(re.search(settings.pattern, text) is not None for text in answers)
        values["score"] = matching / len(answers)
        title += f" · score {values['score']:.2f} ({matching} of {len(answers)} match the pattern)"
    session.metrics.write("sample", step, **values)
    view = Table("prompt", "answer", title=title, title_justify="left")
    for pair in pairs[:8]:
        view.add_row(pair["prompt"], pair["answer"])
    if len(pairs) > 8:
        view.caption = f"and {len(pairs) - 8} more in {run_dir.METRICS}"
    session.console.print(view)
