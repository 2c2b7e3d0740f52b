"""Safetensors files as they lie on disk: headers first, bytes only when they are asked for.

The headers are read here, not through the safetensors library, because its NumPy interface copies
each tensor once more than a memory map does. Layout: 8 bytes length (little endian), a JSON header
with dtype, shape and offsets of each tensor, then the data.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kimi_jax.errors import MissingFileError, UserError, listing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "U8": np.uint8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "BOOL": np.bool_,
}
_LONGEST_NAME = 255  # bytes of a file's name: NAME_MAX of Linux
_VIEWS_AT_ONCE = 1024  # of one system call: IOV_MAX of Linux
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor's place: file, dtype as safetensors names it, shape, first byte and length in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """A read-only view of the tensor in the mapped file; bytes are read as they are touched."""
        flat = (
            np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,)) if self.nbytes else b""
        )
        return np.frombuffer(flat, DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Files:
    """Open files of a checkpoint, to be read by several threads."""

    descriptors: Mapping[Path, int]

    def read(self, file: Path, offset: int, into: Sequence[memoryview]) -> None:
        """Fills memories one after the other with a file's bytes from `offset` on.

        Not through a memory map: taking the pages one by one costs more than copying them.

        Raises:
            UserError: the system cannot read the file, or it has become shorter.
        """
        left = into
        missing = sum(view.nbytes for view in into)
        while missing:
            try:
                count = os.preadv(self.descriptors[file], left[:_VIEWS_AT_ONCE], offset)
            except OSError as error:
                raise UserError(f"{file}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise UserError(f"{file}: has become shorter while it was being read")
            offset, missing = offset + count, missing - count
            if missing:
                left = _without(left, count)


def _without(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of memories when their first `count` bytes are taken away."""
    left = []
    for view in views:
        left.append(view[count:])
        count = max(0, count - view.nbytes)
    return [view for view in left if view.nbytes]


@contextmanager
def open_files(paths: Iterable[Path]) -> Iterator[Files]:
    """Opens files for reading as long as the block runs.

    Raises:
        UserError: a file that cannot be opened.
    """
    with ExitStack() as stack:
        descriptors = {}
        for path in paths:
            try:
                descriptors[path] = stack.enter_context(path.open("rb")).fileno()
            except OSError as error:
                raise UserError(f"{path}: cannot be opened: {error.strerror}") from error
        yield Files(descriptors)


def read_entries(directory: Path) -> dict[str, Entry]:
    """The place of every tensor of an HF directory, from its index and its shards' headers.

    Raises:
        MissingFileError: neither index nor single file, or shards that the index names are absent.
        UserError: an index or header that cannot be right, index and shards that disagree.
    """
    index_path = directory / INDEX
    if not index_path.is_file():
        if (directory / SINGLE).is_file():
            return read_header(directory / SINGLE)
        raise MissingFileError(
            f"{directory}: found neither {INDEX} nor {SINGLE}; is the download complete?"
        )
    weight_map = _weight_map(index_path)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise MissingFileError(
            listing(
                f"{index_path}: {len(absent)} of {len(shards)} shards are not there",
                absent,
                "Download them again, or correct the index.",
            )
        )
    headers: dict[str, dict[str, Entry]] = {}
    broken = []
    for shard in shards:
        try:
            headers[shard] = read_header(directory / shard)
        except UserError as error:
            broken.append(str(error))
    if broken:
        raise UserError(listing(f"{directory}: shards that cannot be read", broken))
    problems = [
        f"{name}: the index places it in {shard}, which does not hold it"
        for name, shard in weight_map.items()
        if name not in headers[shard]
    ]
    problems += [
        f"{name}: stands in {shard}, and the index "
        + (f"places it in {weight_map[name]}" if name in weight_map else "does not name it")
        for shard, header in headers.items()
        for name in header
        if weight_map.get(name) != shard
    ]
    if problems:
        raise UserError(listing(f"{index_path}: disagrees with the shards", problems))
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file.

    Raises:
        UserError: a truncated file, a header that is not one, or tensors outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise UserError(
                f"{path}: {size} bytes, which cannot hold a safetensors header of {length} bytes; "
                "truncated or not a safetensors file: download it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, value) for name, value in header.items()}
        end = _end_of_data(entries, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the header is not a safetensors header: {error}") from error
    if end != size:
        raise UserError(
            f"{path}: the header describes {end} bytes, the file has {size}; "
            f"{'truncated' if size < end else 'too long'}: download it again"
        )
    return entries


def fingerprint(directory: Path) -> str:
    """SHA-256 over config.json and every tensor's name, place and size: which base this is, not its bytes."""
    digest = sha256((directory / "config.json").read_bytes())
    for name, entry in sorted(read_entries(directory).items()):
        digest.update(
            f"{name} {entry.file.name} {entry.dtype} {entry.shape} {entry.offset}\n".encode()
        )
    return digest.hexdigest()


def _entry(path: Path, data_start: int, value: Any) -> Entry:
    begin, end = (int(offset) for offset in value["data_offsets"])
    dtype, shape = str(value["dtype"]), value["shape"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is not a shape")
    nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if begin < 0 or end - begin != nbytes:
        raise ValueError(f"offsets {begin} to {end} do not fit {dtype} of shape {shape}")
    return Entry(path, dtype, tuple(shape), data_start + begin, nbytes)


def _end_of_data(entries: Mapping[str, Entry], data_start: int) -> int:
    """Where the last tensor ends; ValueError unless each begins where the one before it ends."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise ValueError(
                f"{name} begins at byte {entry.offset} of the file, the tensor before it ends at {end}"
            )
        end += entry.nbytes
    return end


def _weight_map(index_path: Path) -> dict[str, str]:
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        assert isinstance(weight_map, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{index_path}: not an index with an object weight_map: {error!r}"
        ) from error
    shards = {shard for shard in weight_map.values() if isinstance(shard, str)}
    plain = {shard for shard in shards if _is_file_name(shard)}
    outside = [
        f"{name}: {shard!r}"
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or shard not in plain
    ]
    if outside:
        raise UserError(
            listing(f"{index_path}: shards must be plain file names beside the index", outside)
        )
    return weight_map


def _is_file_name(text: str) -> bool:
    """Whether a file may be called so: no way to elsewhere, nothing that systems refuse."""
    if not text.isprintable() or len(text.encode()) > _LONGEST_NAME:
        return False
    return text not in ("", ".", "..") and Path(text).name == text
