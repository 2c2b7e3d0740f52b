"""Safetensors files as dictionaries of raw tensors: to damage them in every way."""

import json
from typing import NamedTuple

INDEX = "model.safetensors.index.json"


class Raw(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_raw(path):
    """Every tensor of a file, by name."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: Raw(v["dtype"], tuple(v["shape"]), content[start:][slice(*v["data_offsets"])])
        for name, v in header.items()
    }


def write_raw(path, tensors):
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.data
    write_with_header(path, header, data)


def write_with_header(path, header, data):
    """`header` may be an object or any bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_index(directory):
    return json.loads((directory / INDEX).read_text(encoding="utf-8"))


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_tensors(directory, change):
    """Lets `change` edit a dictionary of all tensors, then writes one shard and its index."""
    shards = sorted(set(read_index(directory)["weight_map"].values()))
    tensors = {}
    for shard in shards:
        tensors |= read_raw(directory / shard)
        (directory / shard).unlink()
    change(tensors)
    write_raw(directory / "all.safetensors", tensors)
    write_index(directory, dict.fromkeys(tensors, "all.safetensors"))
