"""A download against what its config implies, and what it is: for `python -m kimi_jax.inspect`.

Headers of all shards are read, the contents of `weight_shape` tensors and a few packed experts; no
device is touched.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.vocabulary import RANKS_FILE, RESERVED_IDS
from kimi_jax.errors import UserError, listing
from kimi_jax.model.config import ModelConfig
from kimi_jax.weights.checkpoint import Checkpoint, open_checkpoint
from kimi_jax.weights.nibbles import NibbleReport, look_at_nibbles
from kimi_jax.weights.reader import INDEX

# Text on which a split pattern other than this family's gives other pieces.
PROBES = ("helloWorld", "你好world", "don't", "1234567", "  \n x")


@dataclass(frozen=True)
class Files:
    """Shards and their bytes on disk, bytes of tensors, the index's own total, and what it leaves out."""

    shards: int
    bytes: int
    tensor_bytes: int
    index_total_size: int | None
    not_in_index: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """Parameters of one role: all, those that one token meets, and their bytes in memory."""

    parameters: int
    active: int
    bytes: int


@dataclass(frozen=True)
class TokenizerFacts:
    """Sizes of the vocabulary, named control tokens by name, and ids of the probe texts."""

    ranks: int
    vocab_size: int
    end_token: str
    end_id: int
    control: dict[str, int]
    think_is_one_id: bool
    probes: dict[str, list[int]]


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` reports about a checkpoint that passed its checks."""

    directory: str
    config: ModelConfig
    files: Files
    tensors: int
    left_aside: Mapping[str, int]
    roles: Mapping[str, Share]
    total: Share
    router_dtypes: Mapping[str, int]
    correction_bias_dtypes: Mapping[str, int]
    nibbles: NibbleReport | None
    tokenizer: TokenizerFacts | None

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, with the derived numbers and the verdict written out."""
        values = asdict(self)
        values["config"]["softmax_scale"] = self.config.softmax_scale
        if self.nibbles is not None:
            values["nibbles"]["verdict"] = self.nibbles.verdict
        return values


def inspect_checkpoint(directory: Path) -> Inspection:
    """Checks names, dtypes, shapes, sizes and `weight_shape` contents, then describes the checkpoint.

    Raises:
        UserError: whatever does not fit, all of it listed.
    """
    checkpoint = open_checkpoint(directory)
    contradictions = shape_contradictions(checkpoint)
    if contradictions:
        raise UserError(
            listing(
                f"{directory}: {len(contradictions)} weight_shape tensors contradict config.json",
                contradictions,
                "Does config.json belong to these shards?",
            )
        )
    config = checkpoint.config
    roles = parameters_by_role(checkpoint)
    return Inspection(
        str(directory),
        config,
        _files(checkpoint),
        len(checkpoint.tensors),
        checkpoint.left_aside,
        roles,
        Share(*(sum(values) for values in zip(*map(_numbers, roles.values()), strict=True))),
        _dtypes(checkpoint, "mlp.gate.weight"),
        _dtypes(checkpoint, "mlp.gate.e_score_correction_bias"),
        look_at_nibbles(checkpoint) if config.packed_experts and config.num_moe_layers else None,
        _tokenizer_facts(directory, config),
    )


def refuse_misread(inspection: Inspection) -> None:
    """Raises UserError if the packed experts are in a form that `kimi_jax.int4` would misread."""
    nibbles = inspection.nibbles
    if nibbles is not None and nibbles.packing == "twos_complement":
        raise UserError(f"{inspection.directory}: packed experts: {nibbles.verdict}")


def shape_contradictions(checkpoint: Checkpoint) -> list[str]:
    """One line for each `weight_shape` whose two numbers are not [out, in] of its packed tensor."""
    return [
        f"{name}: says {found}, required {list(tensor.weight.shape[1:])}"
        for name, tensor in checkpoint.tensors.items()
        if tensor.part == "shape"
        and (found := checkpoint.entries[name].read().tolist()) != list(tensor.weight.shape[1:])
    ]


def parameters_by_role(checkpoint: Checkpoint) -> dict[str, Share]:
    """Totals over the weight table. A token meets `num_experts_per_tok` of the routed experts."""
    config = checkpoint.config
    shares: dict[str, Share] = {}
    for weight in checkpoint.table:
        active = weight.parameters
        if weight.role == "routed":
            active = active * config.num_experts_per_tok // config.n_routed_experts
        before = shares.get(weight.role, Share(0, 0, 0))
        shares[weight.role] = Share(
            before.parameters + weight.parameters,
            before.active + active,
            before.bytes + weight.bytes,
        )
    return shares


def _numbers(share: Share) -> tuple[int, int, int]:
    return share.parameters, share.active, share.bytes


def _files(checkpoint: Checkpoint) -> Files:
    directory, entries = checkpoint.directory, checkpoint.entries
    shards = {entry.file for entry in entries.values()}
    index = directory / INDEX
    total = None
    if index.is_file():
        metadata = json.loads(index.read_text(encoding="utf-8")).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Files(
        len(shards),
        sum(shard.stat().st_size for shard in shards),
        sum(entry.nbytes for entry in entries.values()),
        total,
        tuple(sorted(path.name for path in set(directory.glob("*.safetensors")) - shards)),
    )


def _dtypes(checkpoint: Checkpoint, weight_name: str) -> dict[str, int]:
    """How many tensors of a weight are stored in which dtype."""
    return dict(
        Counter(
            checkpoint.entries[name].dtype
            for name, tensor in checkpoint.tensors.items()
            if tensor.weight.name == weight_name
        )
    )


def _tokenizer_facts(directory: Path, config: ModelConfig) -> TokenizerFacts | None:
    if not (directory / RANKS_FILE).is_file():
        return None
    tokenizer = Tokenizer.from_checkpoint(directory, config.vocab_size)
    return TokenizerFacts(
        tokenizer.vocab_size - RESERVED_IDS,
        tokenizer.vocab_size,
        tokenizer.end_name,
        tokenizer.end_id,
        {n: i for n, i in tokenizer.control.items() if not n.startswith("<|reserved_token_")},
        all(len(_ids(tokenizer, name)) == 1 for name in ("<think>", "</think>")),
        {text: tokenizer.encode(text) for text in PROBES},
    )


def _ids(tokenizer: Tokenizer, name: str) -> list[int]:
    return [tokenizer.control[name]] if name in tokenizer.control else tokenizer.encode(name)
