"""The files of an HF directory that are not shards: which are copied, and which must change."""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.merge_shards import Shard
from kimi_jax.weights.reader import INDEX

CONFIG = "config.json"
# Weights that the index does not name: another format of the same model, which a merge would belie.
_OTHER_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "*.gguf",
    "*.pt",
    "*.pth",
    "*.onnx",
)


def other_files(checkpoint: Checkpoint) -> tuple[list[Path], tuple[str, ...]]:
    """Files to copy (tokenizer, template, code, …, config and index), and names of weights left out.

    Hidden directories, which hold a download's or version control's own data, are not entered.
    """
    shards = {entry.file for entry in checkpoint.entries.values()}
    copied, left_out = [], []
    for folder, folders, files in checkpoint.directory.walk():
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = folder / name
            if path in shards:
                continue
            is_index = path == checkpoint.directory / INDEX
            if not is_index and any(fnmatchcase(name, pattern) for pattern in _OTHER_WEIGHTS):
                left_out.append(str(path.relative_to(checkpoint.directory)))
            else:
                copied.append(path)
    return copied, tuple(left_out)


def write_unquantised_json(checkpoint: Checkpoint, shards: Iterable[Shard], folder: Path) -> None:
    """config.json without any quantization_config, and the index, if there is one, of the new shards."""
    raw = _read(checkpoint.directory / CONFIG)
    raw.pop("quantization_config", None)
    if isinstance(raw.get("text_config"), dict):
        raw["text_config"].pop("quantization_config", None)
    _write(folder / CONFIG, raw)
    if not (checkpoint.directory / INDEX).is_file():
        return
    shards = list(shards)
    index = _read(checkpoint.directory / INDEX)
    index["metadata"] = {
        **(index.get("metadata") or {}),
        "total_size": sum(entry.nbytes for shard in shards for entry in shard.places.values()),
    }
    index["weight_map"] = {name: shard.name for shard in shards for name in sorted(shard.places)}
    _write(folder / INDEX, index)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
