"""An HF checkpoint whose tensors have been matched, name by name, with what its config implies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_jax.errors import UserError, listing
from kimi_jax.model.config import ModelConfig, load_model_config
from kimi_jax.model.params import Weight, weight_table
from kimi_jax.weights.names import Tensor, expected_tensors, left_aside
from kimi_jax.weights.reader import Entry, read_entries

DEMO = "demo"


@dataclass(frozen=True)
class Checkpoint:
    """A directory, its architecture, its weight table, and where each tensor lies. No bytes read yet."""

    directory: Path
    config: ModelConfig
    table: tuple[Weight, ...]
    tensors: Mapping[str, Tensor]
    entries: Mapping[str, Entry]
    left_aside: Mapping[str, int]  # why, and how many tensors


def resolve_checkpoint(name: str) -> Path:
    """The directory of `model.checkpoint`: a path, or `demo` for the one in the package."""
    if name == DEMO:
        return Path(__file__).parent.parent / "assets" / "demo"
    return Path(name)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads config, index and headers, and matches names, shapes and dtypes on both sides.

    Raises:
        UserError: every missing, unknown, mis-shaped and mistyped tensor, in one message.
    """
    config = load_model_config(directory)
    table = weight_table(config)
    tensors = expected_tensors(table, config)
    entries = read_entries(directory)
    aside = Counter[str]()
    unknown = []
    for name in entries.keys() - tensors.keys():
        reason = left_aside(name, config)
        if reason is None:
            unknown.append(name)
        else:
            aside[reason] += 1
    problems = mismatches(tensors, entries) + [
        f"{name}: not a tensor of this architecture" for name in sorted(unknown)
    ]
    if problems:
        raise UserError(
            listing(
                f"{directory}: {len(problems)} difference{'s' if len(problems) > 1 else ''} "
                "from what config.json implies",
                problems,
                "Nothing was loaded. Is the download complete, and does config.json belong to it?",
                at_most=None,
            )
        )
    return Checkpoint(directory, config, table, tensors, entries, dict(aside))


def mismatches(tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> list[str]:
    """One line for each expected tensor that is absent, mis-shaped or mistyped."""
    problems = []
    for name, tensor in tensors.items():
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name}: missing; required {_any(tensor.dtypes)} {list(tensor.shape)}")
            continue
        if entry.shape != tensor.shape:
            problems.append(
                f"{name}: found shape {list(entry.shape)}, required {list(tensor.shape)}"
            )
        if entry.dtype not in tensor.dtypes:
            problems.append(f"{name}: found dtype {entry.dtype}, required {_any(tensor.dtypes)}")
    return problems


def _any(names: Sequence[str]) -> str:
    return " or ".join(names)
