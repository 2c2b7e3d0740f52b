"""A micro-batch that a caller gives: checked as a whole, before anything is computed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kimi_jax.config import MeshSection
from kimi_jax.errors import UserError, listing
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.transformer import check_tokens
from kimi_jax.training.loss import BATCH_FIELDS

_REQUIRED = ("tokens", "loss_weights")
_LARGEST = np.iinfo(np.int32).max
_HEADLINE = "the batch cannot be used"


def check_batch(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays of a batch, `BATCH_FIELDS`, each [B, T]; absent places are filled in.

    Integers become int32, weights float32. Without `positions` every row counts from 0; without
    `segment_ids` it is one segment.

    Raises:
        UserError: fields missing or unknown, other shapes or types, weights that are not finite, ids
            outside the vocabulary: all that is wrong with the fields.
    """
    problems = [f"{key}: missing" for key in _REQUIRED if key not in batch]
    problems += [
        f"{key}: unknown; known: {', '.join(BATCH_FIELDS)}"
        for key in batch
        if key not in BATCH_FIELDS
    ]
    if problems:
        raise UserError(listing(_HEADLINE, problems))
    arrays = {key: _array(key, batch[key], problems) for key in BATCH_FIELDS if key in batch}
    if problems:
        raise UserError(listing(_HEADLINE, problems))
    shape = arrays["tokens"].shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise UserError(
            f"tokens: found shape {shape}, required [B, T]: at least one row of at least two tokens"
        )
    check_tokens(arrays["tokens"], config)
    arrays.setdefault("positions", np.broadcast_to(np.arange(shape[1]), shape))
    arrays.setdefault("segment_ids", np.ones(shape, np.int32))
    problems = [
        f"{key}: found shape {array.shape}, required {shape}, that of tokens"
        for key, array in arrays.items()
        if array.shape != shape
    ]
    if not np.isfinite(arrays["loss_weights"]).all():
        problems.append("loss_weights: not all finite")
    elif (arrays["loss_weights"] < 0).any():
        # The loss is divided by the sum of the weights: below 0, it would turn gradients around.
        problems.append("loss_weights: some below 0; required: 0 or more")
    for key in ("positions", "segment_ids"):
        if arrays[key].size and not 0 <= arrays[key].min() <= arrays[key].max() <= _LARGEST:
            found = f"{arrays[key].min()} to {arrays[key].max()}"
            problems.append(f"{key}: found {found}; required: 0 to {_LARGEST}")
    if not problems and arrays["loss_weights"][arrays["segment_ids"] == 0].any():
        problems.append("loss_weights: some in segment 0, which is padding; count segments from 1")
    if problems:
        raise UserError(listing(_HEADLINE, problems))
    return {key: _narrow(key, arrays[key]) for key in BATCH_FIELDS}


def check_length(sequence_length: int, config: ModelConfig) -> None:
    """Refuses rows that are longer than the model has positions."""
    positions = config.max_position_embeddings
    if sequence_length > positions:
        raise UserError(
            f"train.sequence_length is {sequence_length}; the model has {positions} positions "
            "(max_position_embeddings of its config.json): set it to at most that"
        )


def _array(key: str, value: Any, problems: list[str]) -> np.ndarray:
    """`value` as an array of its kind, or an empty one and a problem."""
    try:
        array = np.asarray(value, np.float32 if key == "loss_weights" else None)
    except (TypeError, ValueError) as error:
        problems.append(f"{key}: not an array of numbers, all rows of one length ({error})")
        return np.zeros((0, 0), np.int32)
    if key != "loss_weights" and not np.issubdtype(array.dtype, np.integer):
        problems.append(f"{key}: found {array.dtype} {array.shape}, required integers [B, T]")
    return array


def _narrow(key: str, array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if key == "loss_weights" else np.int32)


def check_rows(rows: int, mesh: MeshSection) -> None:
    """Refuses a batch that cannot be spread evenly over the devices."""
    if problem := mesh.problem_of(rows):
        raise UserError(
            f"the batch has {rows} rows; required: {problem}; rows of padding (segment_ids and "
            "loss_weights 0) may fill it up"
        )
