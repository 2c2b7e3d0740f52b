"""Writes a checkpoint of random bytes in K2-Thinking's layout, of any size: for measuring, not for use.

    python tools/synthetic_checkpoint.py --out DIR --gib 30

Tensors have their true sizes, and a layer's stand in one shard of about 10 GB, as in the release; there
are fewer layers, and then fewer experts. Below what two layers take, all widths are divided.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax.errors import UserError
from kimi_jax.model.config import load_model_config
from kimi_jax.model.params import weight_table
from kimi_jax.weights.names import Tensor, expected_tensors
from kimi_jax.weights.reader import DTYPES, INDEX

CONFIG = Path(__file__).parents[1] / "configs" / "k2_thinking" / "config.json"
EXPERTS_TOGETHER = 16  # experts come in such numbers, so that 8 or 16 ranks can share them
WRITERS = 4
_POOL_BYTES = 64 << 20
_DIVIDED = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
)


def sized_config(gib: float) -> dict[str, Any]:
    """K2-Thinking's `config.json` with fewer layers and experts, for at least about `gib` GiB."""
    true = json.loads(CONFIG.read_text(encoding="utf-8"))
    for divisor in (1, 2, 4, 8, 16):
        config = dict(true)
        for field in _DIVIDED:
            config[field] = true[field] // divisor
        sizes = _sizes(config)
        if sizes["fixed"] + sizes["layer"] + EXPERTS_TOGETHER * sizes["expert"] <= gib * 2**30:
            break
    wanted = gib * 2**30 - sizes["fixed"]
    whole = sizes["layer"] + true["n_routed_experts"] * sizes["expert"]
    layers = max(1, math.ceil(wanted / whole))
    experts = (wanted / layers - sizes["layer"]) / sizes["expert"]
    together = max(1, math.ceil(experts / EXPERTS_TOGETHER)) * EXPERTS_TOGETHER
    config["num_hidden_layers"] = layers + true["first_k_dense_replace"]
    config["n_routed_experts"] = min(true["n_routed_experts"], together)
    return config


def write_checkpoint(directory: Path, config: Mapping[str, Any]) -> int:
    """Writes config, shards and index; returns the bytes of the tensors. Memory stays at two pools."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards = _shards(directory)
    total = sum(_nbytes(tensor) for members in shards for tensor in members)
    free = shutil.disk_usage(directory).free
    if free < 1.02 * total:
        raise UserError(f"{directory}: {free:,} bytes are free, {total:,} are to be written")
    rng = np.random.default_rng(0)
    integers = rng.integers(0, 256, _POOL_BYTES, np.uint8)
    # Without the highest bit of the exponent: finite, below 2.
    floats = (integers.view(np.uint16) & 0xBFFF).view(np.uint8)
    names = [
        f"model-{number + 1:05}-of-{len(shards):06}.safetensors" for number in range(len(shards))
    ]
    with ThreadPoolExecutor(WRITERS) as pool:
        pools = {"I32": integers, "BF16": floats, "F32": floats}
        written = [
            pool.submit(_write_shard, directory / name, members, pools)
            for name, members in zip(names, shards, strict=True)
        ]
        for each in written:
            each.result()
    weight_map = {
        tensor.name: name for name, members in zip(names, shards, strict=True) for tensor in members
    }
    # Last: a directory with an index is whole.
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return total


def _shards(directory: Path) -> list[list[Tensor]]:
    """Tensors by layer, what stands in no layer with its neighbour, in the order of the library."""
    config = load_model_config(directory)
    shards: list[list[Tensor]] = [[] for _ in range(config.num_hidden_layers)]
    for tensor in expected_tensors(weight_table(config), config).values():
        number = tensor.layer
        if tensor.weight.stack == "moe_layers":
            number += config.first_k_dense_replace
        elif not tensor.weight.stack and tensor.weight.role != "embedding":
            number = -1
        shards[number].append(tensor)
    return [sorted(members, key=lambda t: (t.dtypes[0] == "BF16", t.name)) for members in shards]


def _write_shard(path: Path, members: Sequence[Tensor], pools: Mapping[str, np.ndarray]) -> None:
    header, end = {}, 0
    for tensor in members:
        header[tensor.name] = {
            "dtype": tensor.dtypes[0],
            "shape": tensor.shape,
            "data_offsets": [end, end + _nbytes(tensor)],
        }
        end += _nbytes(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=1 << 20) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, tensor in enumerate(members):
            for part in _content(tensor, number, pools[tensor.dtypes[0]]):
                file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _content(tensor: Tensor, number: int, pool: np.ndarray) -> Iterator[memoryview]:
    if tensor.part == "shape":
        yield memoryview(np.asarray(tensor.weight.shape[-2:], np.int32)).cast("B")
        return
    left, start = _nbytes(tensor), number * 65_544 % (_POOL_BYTES // 2)  # no two tensors are alike
    while left:
        part = pool[start : start + left]
        yield memoryview(part)
        left, start = left - part.nbytes, 0


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of one routed expert, of the rest of a layer that has them, and of all else."""
    hidden, width, heads = (
        config[key] for key in ("hidden_size", "moe_intermediate_size", "num_attention_heads")
    )
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    rope, nope, value = (
        config[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    attention = query * (hidden + heads * (nope + rope)) + hidden * (latent + rope)
    attention += latent * heads * (nope + value) + hidden * heads * value
    dense = 3 * hidden * config["intermediate_size"]
    return {
        "expert": 3 * hidden * width * 9 // 16,  # half a byte, and a scale for 32
        "layer": 2 * (attention + 3 * hidden * width + config["n_routed_experts"] * hidden),
        "fixed": 2 * (2 * config["vocab_size"] * hidden + attention + dense),
    }


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(DTYPES[tensor.dtypes[0]]).itemsize


def main() -> None:
    """Reads the command line and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--gib", type=float, default=30.0, help="about how large")
    options = parser.parse_args()
    total = write_checkpoint(options.out, sized_config(options.gib))
    print(f"Wrote {total / 1e9:.2f} GB to {options.out}.")


if __name__ == "__main__":
    main()
