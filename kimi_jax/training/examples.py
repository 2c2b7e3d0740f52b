"""The rows of a run: found, read, checked, counted, and shown with `--preview`."""

from pathlib import Path

from rich.console import Console

from kimi_jax.config import RunConfig
from kimi_jax.data.chat import Chat
from kimi_jax.data.examples import Examples
from kimi_jax.data.preview import preview as preview_of
from kimi_jax.data.rows import JsonlRows
from kimi_jax.errors import UserError
from kimi_jax.weights.checkpoint import DEMO, resolve_checkpoint

_DEMO_ROWS = {"train": "train.jsonl", "eval": "held_out.jsonl"}


def resolve_rows(name: str, use: str) -> Path:
    """The file of `data.train` or `data.eval`: a path, or `demo` for the one in the package."""
    if name == DEMO:
        return Path(__file__).parent.parent / "assets" / "yoda" / _DEMO_ROWS[use]
    return Path(name)


def read_examples(
    config: RunConfig, chat: Chat, console: Console
) -> tuple[Examples, Examples | None]:
    """Reads, checks and measures training and held-out rows, and prints what was found."""
    settings, length = config.data, config.train.sequence_length
    found: dict[str, Examples] = {}
    for use, name in (("train", settings.train), ("eval", settings.eval)):
        if name is None:
            continue
        rows = JsonlRows(resolve_rows(name, use))
        found[use] = Examples(rows, chat, length, settings.overlong)
        counts = found[use].counts
        notes = {
            "overlong dropped": counts.dropped,
            f"cut at {length} tokens": counts.truncated,
            "rows that train nothing": counts.untrained_rows,
        }
        console.print(
            f"data.{use} {name}: {counts.rows} rows, {counts.examples} examples, "
            f"{counts.tokens:,} tokens, {counts.trained_tokens:,} of them trained"
            + "".join(f"; {count} {note}" for note, count in notes.items() if count),
            highlight=False,
        )
    return found["train"], found.get("eval")


def preview(config: RunConfig, count: int, console: Console) -> None:
    """Prints the first `count` training examples with the weight of each token, and trains nothing."""
    if count < 1:
        raise UserError(f"--preview {count}: required: at least 1")
    chat = Chat.from_checkpoint(resolve_checkpoint(config.model.checkpoint))
    examples = Examples(
        JsonlRows(resolve_rows(config.data.train, "train")),
        chat,
        config.train.sequence_length,
        config.data.overlong,
    )
    for index in range(min(count, len(examples))):
        console.rule(examples.where(index))
        console.print(preview_of(examples[index], chat.tokenizer))
