"""Which bytes go where in a merged checkpoint: one job per tensor, or per packed projection.

A job reads, computes and returns what is to be written; it runs in a thread.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_jax.lora import FACTORS, AdapterPlan
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.merge import LowRank, Survival, merge_bf16, merge_int4, unpack_to_bf16
from kimi_jax.weights.names import Part, Tensor
from kimi_jax.weights.output import Record, place
from kimi_jax.weights.reader import Entry

Key = tuple[str, int, int | None]  # path, layer, expert


class Done(NamedTuple):
    """What a job gives: arrays and their offsets, and, for a tensor that changed, how well."""

    writes: list[tuple[int, np.ndarray]]
    path: str = ""
    survival: Survival | None = None


Job = Callable[[], Done]


class MergeSource(NamedTuple):
    """What is merged: a base and adapters on the host."""

    checkpoint: Checkpoint
    plan: AdapterPlan
    factors: Mapping[str, np.ndarray]
    unpack: bool  # packed experts become bf16

    def adapter(self, tensor: Tensor) -> LowRank | None:
        """The adapter of one tensor, or None if it has none or one that is zero."""
        adapter = self.plan.get(tensor.weight.path)
        if adapter is None:
            return None
        a, b = (self._matrix(tensor, factor) for factor in FACTORS)
        low_rank = LowRank(a, b, adapter.scale)
        return None if low_rank.is_zero else low_rank

    def _matrix(self, tensor: Tensor, factor: str) -> np.ndarray:
        array = self.factors[f"{tensor.weight.path}.{factor}"]
        if tensor.weight.stack:
            array = array[tensor.layer]
        # A factor that experts share has no expert dimension.
        return array[tensor.expert] if array.ndim == 3 else array


class Shard(NamedTuple):
    """One file of the merged checkpoint: its first bytes, where its tensors go, and what fills them."""

    name: str
    head: bytes
    places: Mapping[str, Entry]
    jobs: Callable[[], Iterator[Job]]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(entry.nbytes for entry in self.places.values())


def plan_shards(source: MergeSource) -> list[Shard]:
    """The files of the merged checkpoint, under the names of the base's."""
    entries = source.checkpoint.entries
    triples = _triples(source.checkpoint)
    packed = {_plain_name(names["packed"]): names["packed"] for names in triples.values()}
    by_file: dict[Path, dict[str, Entry]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, {})[name] = entry
    shards = []
    for file in sorted(by_file):
        if source.unpack:
            head, places = place(_unpacked(source, by_file[file]), file, {"format": "pt"})
        else:
            head, places = _head(file), by_file[file]
        if places:  # a file of nothing but scales has nothing left in it
            jobs = partial(_jobs, source, triples, packed, places)
            shards.append(Shard(file.name, head, places, jobs))
    return shards


def _triples(checkpoint: Checkpoint) -> dict[Key, dict[Part, str]]:
    """The tensors of each packed projection, which may lie in different files."""
    triples: dict[Key, dict[Part, str]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.part != "value":
            triples.setdefault(_key(tensor), {})[tensor.part] = tensor.name
    return triples


def _key(tensor: Tensor) -> Key:
    return tensor.weight.path, tensor.layer, tensor.expert


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))


def _unpacked(source: MergeSource, entries: Mapping[str, Entry]) -> Iterator[Record]:
    """The tensors of a shard with a `.weight` in place of packed words; scales and shapes go."""
    for name, entry in entries.items():
        tensor = source.checkpoint.tensors.get(name)
        if tensor is None or tensor.part == "value":
            yield Record(name, entry.dtype, entry.shape)
        elif tensor.part == "packed":
            yield Record(_plain_name(name), "BF16", tensor.weight.shape[1:])


def _plain_name(packed: str) -> str:
    return packed.removesuffix("_packed")


def _jobs(
    source: MergeSource,
    triples: Mapping[Key, Mapping[Part, str]],
    packed: Mapping[str, str],
    places: Mapping[str, Entry],
) -> Iterator[Job]:
    """The jobs that fill one shard, in the order of its tensors.

    Args:
        source: what is merged.
        triples: tensor names of each packed projection.
        packed: the name of the packed words by that of the unpacked weight.
        places: the shard's tensors.
    """
    checkpoint = source.checkpoint
    begun = set[Key]()
    for name, target in sorted(places.items(), key=lambda item: item[1].offset):
        tensor = checkpoint.tensors.get(packed.get(name, name))
        if name in packed:
            assert tensor is not None
            yield partial(_unpack, source, tensor, triples[_key(tensor)], target.offset)
        elif tensor is None or tensor.part == "shape" or tensor.weight.path not in source.plan:
            yield partial(_copy, checkpoint.entries[name], target.offset)
        elif tensor.part == "value":
            yield partial(_merge_value, source, tensor, target.offset)
        elif _key(tensor) not in begun:
            begun.add(_key(tensor))
            names = triples[_key(tensor)]
            parts: tuple[Part, ...] = ("packed", "scale")
            offsets: dict[Part, int] = {
                part: places[names[part]].offset for part in parts if names[part] in places
            }
            yield partial(_merge_packed, source, tensor, names, offsets)


def _copy(entry: Entry, offset: int) -> Done:
    return Done([(offset, entry.read())])


def _merge_value(source: MergeSource, tensor: Tensor, offset: int) -> Done:
    weight = source.checkpoint.entries[tensor.name].read()
    adapter = source.adapter(tensor)
    if adapter is None:
        return Done([(offset, weight)])
    merged, survival = merge_bf16(weight, adapter)
    return Done([(offset, merged)], tensor.weight.path, survival)


def _unpack(source: MergeSource, tensor: Tensor, names: Mapping[Part, str], offset: int) -> Done:
    words, scale = (source.checkpoint.entries[names[part]].read() for part in ("packed", "scale"))
    weight = unpack_to_bf16(words, scale)
    adapter = source.adapter(tensor)
    if adapter is None:
        return Done([(offset, weight)])
    merged, survival = merge_bf16(weight, adapter)
    return Done([(offset, merged)], tensor.weight.path, survival)


def _merge_packed(
    source: MergeSource, tensor: Tensor, names: Mapping[Part, str], offsets: Mapping[Part, int]
) -> Done:
    """Both parts are computed even if one lies in another shard, whose own job computes them again."""
    words, scale = (source.checkpoint.entries[names[part]].read() for part in ("packed", "scale"))
    adapter = source.adapter(tensor)
    survival = None
    if adapter is not None:
        words, scale, survival = merge_int4(words, scale, adapter)
    values: dict[Part, np.ndarray] = {"packed": words, "scale": scale}
    writes = [(offset, values[part]) for part, offset in offsets.items()]
    if survival is None or "packed" not in offsets:  # counted once, with the words
        return Done(writes)
    return Done(writes, tensor.weight.path, survival)
