"""Output directories that exist whole or not at all, and the safetensors files in them."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_jax.errors import UserError
from kimi_jax.weights.reader import DTYPES, Entry


class Record(NamedTuple):
    """A tensor to be written: name, dtype as safetensors names it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def new_directory(out: Path, bytes_needed: int = 0) -> Iterator[Path]:
    """A directory to write into, which takes the name `out` when the block ends without an error.

    Until then it stands beside `out` as `.<name>.partial`, so that a killed export leaves nothing
    that looks like one. After an error it is removed.

    Raises:
        UserError: `out` holds something, a partial one stands beside it, or the disk has too little room.
    """
    out = check_output(out)
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        raise UserError(
            f"{partial}: found what an export to {out.name} left when it was stopped, or one that still "
            "runs. If none does, delete it and start again."
        )
    _require_space(out, bytes_needed)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be made: {error.strerror}; name another directory"
        ) from error
    try:
        yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the error itself is what must be seen
        raise


def check_output(out: Path) -> Path:
    """The absolute path of an output directory that is absent or empty.

    Raises:
        UserError: a file, a mount point (which cannot be renamed onto), or a directory with something in it.
    """
    resolved = out.resolve()
    if resolved.exists() and not resolved.is_dir():
        raise UserError(f"{out}: is a file; required: a new or empty directory")
    if resolved.is_dir() and any(resolved.iterdir()):
        raise UserError(
            f"{out}: not empty; nothing in it was touched. Name a new or an empty directory"
        )
    if resolved.is_mount():
        raise UserError(f"{out}: is a mount point; name a new directory below it")
    return resolved


def place(
    records: Iterable[Record], file: Path, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a safetensors file (length and header), and where each tensor goes in it.

    Wider types come first and the data begins at a multiple of 8, so every tensor is aligned.
    """
    ordered = sorted(records, key=lambda r: (-np.dtype(DTYPES[r.dtype]).itemsize, r.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets = [0]
    for record in ordered:
        size = int(np.prod(record.shape, dtype=np.int64)) * np.dtype(DTYPES[record.dtype]).itemsize
        offsets.append(offsets[-1] + size)
        header[record.name] = {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "data_offsets": offsets[-2:],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {
        record.name: Entry(file, record.dtype, record.shape, start + begin, end - begin)
        for record, begin, end in zip(ordered, offsets[:-1], offsets[1:], strict=True)
    }
    return len(text).to_bytes(8, "little") + text, entries


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """An array's bytes as flat uint8, which any file takes (bf16 has no buffer interface)."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes float32 tensors to one file, with the metadata `format: pt` that loaders ask for."""
    records = [Record(name, "F32", array.shape) for name, array in tensors.items()]
    head, entries = place(records, path, {"format": "pt"})
    with path.open("wb") as file:
        file.write(head)
        for name, entry in entries.items():
            assert tensors[name].dtype == np.float32, name
            assert file.tell() == entry.offset, name
            file.write(raw_bytes(tensors[name]).data)
        file.flush()
        os.fsync(file.fileno())


def _require_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{out}: the export takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on that disk; "
            "free some room or name a directory on another disk"
        )
