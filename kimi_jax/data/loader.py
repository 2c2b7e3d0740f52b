"""Batches for training, endless and resumable, and for held-out loss, one pass."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kimi_jax.data.examples import Examples
from kimi_jax.data.packing import Batch, empty_rows, packed_batches
from kimi_jax.errors import UserError, listing


class Batches:
    """An endless iterator over batches (see `packing.Batch`), the same for the same arguments.

    Each example occurs once in an epoch; `shuffle` gives every epoch its own order from `seed`.
    With `pack` several examples share a row, without it each has its own.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        rows_per_batch: int,
        seed: int,
        shuffle: bool = True,
        pack: bool = True,
    ) -> None:
        assert rows_per_batch > 0
        self.epoch_size = len(examples)  # examples in an epoch
        self._identity = {
            "examples": examples.fingerprint,
            "rows_per_batch": rows_per_batch,
            "seed": seed,
            "shuffle": shuffle,
            "pack": pack,
        }
        self._batches = iter(
            packed_batches(examples, rows_per_batch, seed, shuffle, repeat=True, pack=pack)
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch, as JSON values, with what it is a position in."""
        return {"of": dict(self._identity), "position": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues behind the batch after which `state` was taken, with exactly those batches.

        Raises UserError if the state was taken over other data or with other settings.
        """
        differing = [
            f"{key}: was {state['of'].get(key)!r}, is {value!r}"
            for key, value in self._identity.items()
            if state["of"].get(key) != value
        ]
        if differing:
            raise UserError(
                listing(
                    "The saved position belongs to other data or settings:",
                    differing,
                    "Restore the data file, template and settings of the run, or begin a new run "
                    '("examples" covers the file, the chat template, the tokenizer, '
                    "train.sequence_length and data.overlong).",
                )
            )
        self._batches.set_state(state["position"])


def held_out_batches(
    examples: Examples, *, rows_per_batch: int, pack: bool = True
) -> Iterator[Batch]:
    """One pass over `examples` in order; the last batch is filled up with empty rows (weight 0)."""
    assert rows_per_batch > 0
    for batch in packed_batches(
        examples, rows_per_batch, 0, shuffle=False, repeat=False, pack=pack
    ):
        missing = rows_per_batch - len(batch["tokens"])
        padding = empty_rows(missing, examples.sequence_length)
        yield {key: np.concatenate([batch[key], padding[key]]) for key in batch}
