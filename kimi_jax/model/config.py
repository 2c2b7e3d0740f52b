"""The architecture of a checkpoint, read from its `config.json` and from nowhere else.

There are no presets and no default for a number that differs within the family (see the fields of
`ModelConfig`): a missing field is an error. Field names are HF's.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kimi_jax.errors import MissingFileError, UserError, listing
from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.model.config_fields import Fields, as_object

ARCHITECTURES = ("kimi_k2", "deepseek_v3", "kimi_k25")
WRAPPED_PREFIX = "language_model."


@dataclass(frozen=True)
class Yarn:
    """`rope_scaling` of type yarn. `factor`, `beta_fast` differ between releases of the family."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of one checkpoint. Sizes as in HF's DeepseekV3Config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    packed_experts: bool
    prefix: Literal["", "language_model."]
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: nope and rope parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def softmax_scale(self) -> float:
        """1/√(head width), times YaRN's squared attention multiplier (DeepseekV3Attention.scaling)."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.mscale_all_dim:
            scale *= yarn_multiplier(self.yarn.factor, self.yarn.mscale_all_dim) ** 2
        return scale


def yarn_multiplier(factor: float, mscale: float) -> float:
    """YaRN's attention multiplier, 0.1 · mscale · ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def load_model_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of an HF directory.

    Raises:
        MissingFileError: no directory, or no config.json in it.
        UserError: not JSON, not of this family, or with fields missing or unsupported (all listed).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such checkpoint directory")
    path = directory / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{path}: not found; an HF checkpoint directory has a config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found a {type(raw).__name__}, required a JSON object")
    return parse_model_config(raw, str(path))


def parse_model_config(raw: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
    """Makes a `ModelConfig` of the contents of a `config.json`; see `load_model_config`."""
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{name}: model_type is {model_type!r}; kimi_jax reads {', '.join(ARCHITECTURES)}"
        )
    wrapped = model_type == "kimi_k25"
    text = raw.get("text_config") if wrapped else raw
    if not isinstance(text, Mapping):
        raise UserError(f"{name}: model_type kimi_k25 needs an object text_config")
    fields = Fields(text)
    rope_theta, yarn = _rope(fields)
    config = ModelConfig(
        hidden_size=fields.positive("hidden_size"),
        num_hidden_layers=fields.positive("num_hidden_layers"),
        num_attention_heads=fields.positive("num_attention_heads"),
        intermediate_size=fields.positive("intermediate_size"),
        moe_intermediate_size=fields.positive("moe_intermediate_size"),
        n_routed_experts=fields.positive("n_routed_experts"),
        num_experts_per_tok=fields.positive("num_experts_per_tok"),
        n_shared_experts=fields.positive("n_shared_experts"),
        first_k_dense_replace=fields.integer("first_k_dense_replace", 0),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        norm_topk_prob=fields.boolean("norm_topk_prob"),
        q_lora_rank=None if fields.is_null("q_lora_rank") else fields.positive("q_lora_rank"),
        kv_lora_rank=fields.positive("kv_lora_rank"),
        qk_nope_head_dim=fields.positive("qk_nope_head_dim"),
        qk_rope_head_dim=fields.positive("qk_rope_head_dim"),
        v_head_dim=fields.positive("v_head_dim"),
        vocab_size=fields.positive("vocab_size"),
        max_position_embeddings=fields.positive("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        yarn=yarn,
        packed_experts=_packed_experts(fields),
        prefix=WRAPPED_PREFIX if wrapped else "",
        eos_token_ids=_token_ids(text if "eos_token_id" in text else raw, fields.problems),
    )
    _check_supported(fields)
    if wrapped and raw.get("tie_word_embeddings") is True:
        fields.problems.append(
            "tie_word_embeddings is True beside text_config; kimi_jax computes False"
        )
    if not fields.problems:
        _check_sizes(config, fields.problems)
    if fields.problems:
        raise UserError(listing(f"{name}: cannot be used", fields.problems))
    return config


def _rope(fields: Fields) -> tuple[float, Yarn | None]:
    """rope_theta and YaRN; both the original keys and the `rope_parameters` that transformers 5 saves."""
    saved = fields.raw.get("rope_parameters")
    if isinstance(saved, Mapping) and "rope_theta" not in fields.raw:
        inner = Fields(saved)
        theta = inner.number("rope_theta")
        scaling: Any = None if saved.get("rope_type", "default") == "default" else saved
        fields.problems += [f"rope_parameters.{p}" for p in inner.problems]
    else:
        theta = fields.number("rope_theta")
        scaling = fields.raw.get("rope_scaling")
    if scaling is None:
        return theta, None
    if not isinstance(scaling, Mapping):
        fields.problems.append(f"rope_scaling is {scaling!r}; required: null or an object")
        return theta, None
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        fields.problems.append(f"rope_scaling has type {kind!r}; kimi_jax computes yarn or null")
        return theta, None
    inner = Fields(scaling)
    yarn = Yarn(
        factor=inner.number("factor"),
        original_max_position_embeddings=inner.positive("original_max_position_embeddings"),
        beta_fast=inner.number("beta_fast"),
        beta_slow=inner.number("beta_slow"),
        mscale=inner.number("mscale"),
        mscale_all_dim=inner.number("mscale_all_dim"),
    )
    fields.problems += [f"rope_scaling.{problem}" for problem in inner.problems]
    return theta, yarn


def _packed_experts(fields: Fields) -> bool:
    """Whether routed experts are int4 pack-quantized; any other quantisation is refused."""
    found = fields.raw.get("quantization_config")
    if found is None:
        return False
    if not isinstance(found, Mapping) or found.get("quant_method") != "compressed-tensors":
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        fields.problems.append(
            f"quantization_config.quant_method is {method!r}; kimi_jax reads compressed-tensors int4 "
            "or unquantised checkpoints (convert fp8 releases to bf16 first)"
        )
        return False
    groups = found.get("config_groups")
    weights = [as_object(as_object(g).get("weights")) for g in as_object(groups).values()]
    required = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP_SIZE,
    }
    if found.get("format") != "pack-quantized" or len(weights) != 1:
        fields.problems.append(
            f"quantization_config has format {found.get('format')!r} and {len(weights)} config_groups; "
            "required: pack-quantized and one group"
        )
        return False
    for key, value in required.items():
        if weights[0].get(key) != value:
            fields.problems.append(
                f"quantization_config weights.{key} is {weights[0].get(key)!r}; required: {value!r}"
            )
    return True


def _check_supported(fields: Fields) -> None:
    """Fields whose other values would silently compute something else."""
    required: dict[str, tuple[Any, ...]] = {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "n_group": (1,),
        "topk_group": (1,),
        "moe_layer_freq": (1,),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "rope_interleave": (True,),
        "num_nextn_predict_layers": (0, None),
    }
    must_be_present = ("n_group", "topk_group")
    for key, accepted in required.items():
        if key not in fields.raw:
            if key in must_be_present:
                fields.problems.append(f"{key} is missing; required: {accepted[0]!r}")
        elif fields.raw[key] not in accepted:
            fields.problems.append(
                f"{key} is {fields.raw[key]!r}; kimi_jax computes {accepted[0]!r}"
            )


def _check_sizes(config: ModelConfig, problems: list[str]) -> None:
    """Relations between fields that the mathematics needs."""
    if config.num_experts_per_tok > config.n_routed_experts:
        problems.append(
            f"num_experts_per_tok is {config.num_experts_per_tok}; required: at most "
            f"n_routed_experts, {config.n_routed_experts}"
        )
    if config.first_k_dense_replace > config.num_hidden_layers:
        problems.append(
            f"first_k_dense_replace is {config.first_k_dense_replace}; required: at most "
            f"num_hidden_layers, {config.num_hidden_layers}"
        )
    if config.qk_rope_head_dim % 2:
        problems.append(
            f"qk_rope_head_dim is {config.qk_rope_head_dim}; required: even (pairs are rotated)"
        )
    for key in ("hidden_size", "moe_intermediate_size"):
        if config.packed_experts and getattr(config, key) % GROUP_SIZE:
            problems.append(
                f"{key} is {getattr(config, key)}; int4 groups need a multiple of {GROUP_SIZE}"
            )


def _token_ids(raw: Mapping[str, Any], problems: list[str]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    given = value if isinstance(value, list) else [value]
    ids = tuple(i for i in given if isinstance(i, int) and not isinstance(i, bool))
    if not ids or len(ids) < len(given):
        problems.append(f"eos_token_id is {value!r}; required: a token id or a list of them")
    return ids
