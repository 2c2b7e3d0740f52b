"""Lays examples side by side in rows of fixed length, each kept to itself by its segment id."""

from typing import Any

import grain
import numpy as np
from grain import experimental
from jaxtyping import Float32, Int32

from kimi_jax.data.chat import Example
from kimi_jax.data.examples import Examples

Batch = dict[str, np.ndarray]
"""`tokens`, `positions`, `segment_ids` int32 [B, T] and `loss_weights` float32 [B, T].

Positions restart at 0 in each document; segment ids count the documents of a row from 1. Padding
has segment 0 and zeros everywhere else.
"""

_OPEN_ROWS = 32  # rows that a document may be fitted into; more pack tighter and stray further


def packed_batches(
    examples: Examples, rows_per_batch: int, seed: int, shuffle: bool, repeat: bool, pack: bool
) -> grain.IterDataset[Batch]:
    """Batches of `rows_per_batch` rows of `examples.sequence_length` tokens.

    Order: the examples, shuffled anew for each epoch from `seed` (if `shuffle`), endlessly (if
    `repeat`; the packer then fills rows across the end of an epoch), each put into the first row
    that has room. Without `pack`, one example a row. The last batch of a finite pass may have
    fewer rows.
    """
    order = grain.MapDataset.source(examples)
    if shuffle:
        order = order.shuffle(seed=seed % 2**32)
    if repeat:
        order = order.repeat()
    # No read threads: the examples are in memory, or a step's time pays for tokenising a few.
    stream = order.map(_as_dict).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    open_rows = rows_per_batch * -(-_OPEN_ROWS // rows_per_batch) if pack else rows_per_batch
    length = examples.sequence_length
    rows = experimental.FirstFitPackIterDataset(
        stream,
        length_struct={"tokens": length, "loss_weights": length},
        num_packing_bins=open_rows,
        seed=seed % 2**32,
        shuffle_bins=shuffle and pack,
        max_sequences_per_bin=None if pack else 1,
    )
    return rows.map(_as_row).batch(rows_per_batch, drop_remainder=False)


def empty_rows(rows: int, length: int) -> Batch:
    """A batch of `rows` rows of padding alone: every weight and segment id is 0."""
    zeros: Int32[np.ndarray, "B T"] = np.zeros((rows, length), np.int32)
    weights: Float32[np.ndarray, "B T"] = np.zeros((rows, length), np.float32)
    return {
        "tokens": zeros,
        "loss_weights": weights,
        "positions": zeros.copy(),
        "segment_ids": zeros.copy(),
    }


def _as_dict(example: Example) -> dict[str, np.ndarray]:
    return {"tokens": example.tokens, "loss_weights": example.loss_weights}


def _as_row(packed: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        "tokens": packed["tokens"],
        "loss_weights": packed["loss_weights"],
        "positions": packed["tokens_positions"],
        "segment_ids": packed["tokens_segment_ids"],
    }
