"""Held-out loss and sampled answers, at their intervals."""

import math
import re
from typing import Any

from rich.table import Table

from kimi_jax.errors import RunStopped
from kimi_jax.training import run_dir
from kimi_jax.training.session import Session


def due(session: Session, step: int) -> list[str]:
    """What is to be looked at after `step` updates, `eval` or `sample`, and is not in the record.

    Both come at their intervals, first and last.
    """
    if session.data.held_out is None:
        return []
    settings, last = session.config.evaluate, session.config.train.steps
    intervals = {"eval": settings.loss_every, "sample": settings.sample_every}
    return [
        kind
        for kind, every in intervals.items()
        if every is not None
        and (step % every == 0 or step == last)
        and not session.metrics.has(kind, step)
    ]


def look(session: Session) -> None:
    """Held-out loss and sampled answers where they are due. No step is in flight."""
    if session.stop:
        return
    step = session.trainer.step
    kinds = due(session, step)
    if "eval" in kinds:
        loss = session.trainer.evaluate(session.data.held_out_batches())["loss"]
        if not math.isfinite(loss):
            raise RunStopped(
                f"the held-out loss after step {step} is {loss}; look at the rows of data.eval first"
            )
        session.metrics.write("eval", step, loss=loss)
        session.console.print(f"step {step} · held-out loss {loss:.4f}", highlight=False)
    if "sample" in kinds:
        _sample(session)


def _sample(session: Session) -> None:
    step, settings, held_out = session.trainer.step, session.config.evaluate, session.data.held_out
    assert held_out is not None
    chosen = range(min(settings.samples, len(held_out)))
    prompts = [held_out.prompt(index) for index in chosen]
    answers = session.trainer.sample(prompts, settings.max_new_tokens)
    pairs = [
        {"prompt": held_out.question(index), "answer": text}
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
