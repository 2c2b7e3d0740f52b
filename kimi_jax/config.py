"""The configuration of a run: sections, types, and the reasons a value is refused.

`RunConfig` says what a run decides; `kimi_jax.config_file` reads it from YAML. Architecture numbers
are not here: they come from the checkpoint's own `config.json`.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

Recompute = Literal["none", "layer"]
Keep = Literal[
    "stream",
    "latents",
    "queries",
    "keys_values",
    "attention",
    "feed_forward",
    "expert_gate",
    "expert_up",
]
ExpertFactors = Literal["per_expert", "shared"]
Rest = Literal["sharded", "replicated"]
ActivationDtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A frozen section that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunSection(Section):
    """Where the run lives and what makes it repeatable."""

    dir: str = Field(description="run directory: metrics, checkpoints, samples, resolved config")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        description="seed of adapters and data order"
    )


class ModelSection(Section):
    """The base model and the arithmetic of its activations."""

    checkpoint: str = Field(description="HF directory, or `demo` for the one in the package")
    dtype: ActivationDtype = Field(
        default="bfloat16", description="dtype of activations and matmuls"
    )
    latent_norm_eps: PositiveFloat = Field(
        default=1e-6,
        description="eps of q_a_layernorm and kv_a_layernorm: 1e-6 as HF computes, 1e-5 as vLLM and SGLang",
    )


class LoraSection(Section):
    """What is trained."""

    rank: PositiveInt = Field(description="rank of every target but routed experts")
    alpha: PositiveFloat = Field(description="an adapter's change is alpha / rank · B · A")
    targets: tuple[str, ...] = Field(
        min_length=1,
        strict=False,
        description="roles (attention, dense, shared, routed, head), linear layers, or patterns",
    )
    expert_rank: PositiveInt | None = Field(
        default=None, description="rank of routed experts; null: `rank`"
    )
    expert_alpha: PositiveFloat | None = Field(
        default=None, description="alpha of routed experts; null: the same alpha / rank ratio"
    )
    expert_factors: ExpertFactors = Field(
        default="per_expert",
        description="`shared`: experts of a layer share the factor on the hidden side",
    )

    @property
    def routed_rank(self) -> int:
        """Rank of routed experts' adapters."""
        return self.expert_rank or self.rank

    @property
    def routed_alpha(self) -> float:
        """Alpha of routed experts' adapters; unset, it keeps the ratio alpha / rank of the others."""
        return self.expert_alpha or self.alpha * self.routed_rank / self.rank


class DataSection(Section):
    """The rows that are trained and evaluated on."""

    train: str = Field(description="JSONL of chat `messages` or of `prompt` and `completion`")
    eval: str | None = Field(default=None, description="JSONL of held-out rows")
    pack: bool = Field(
        default=True, description="several documents a row; false: one document a row"
    )
    shuffle: bool = True
    overlong: Literal["error", "drop", "truncate"] = Field(
        default="error", description="what happens to an example longer than the sequence length"
    )


class TrainSection(Section):
    """The optimisation."""

    steps: PositiveInt
    learning_rate: PositiveFloat
    micro_batch: PositiveInt = Field(
        description="rows of one forward and backward pass, of all devices together"
    )
    accumulate: PositiveInt = Field(description="micro-batches of one optimizer step")
    sequence_length: Annotated[int, Field(ge=2)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="where a linear or cosine schedule ends, as a part of learning_rate",
    )
    weight_decay: NonNegativeFloat = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = Field(
        default=1.0, description="global gradient norm; null: no clipping"
    )
    recompute: Recompute = Field(
        default="layer",
        description="`layer`: keep each layer's input for the backward pass, and what `keep` names",
    )
    keep: list[Keep] = Field(
        default_factory=list,
        description="under recompute=layer, what is kept as well: `stream`, the residual stream after "
        "attention; `latents`, the compressed queries, keys and values; `queries` and `keys_values`, "
        "those of every head; `attention`, its output; "
        "`feed_forward`, gate and up of dense and shared layers; `expert_gate`, `expert_up`, those of "
        "routed experts",
    )
    offload: list[Keep] = Field(
        default_factory=list,
        description="the same, kept in the host's memory: it travels over PCIe beside the computation",
    )
    loss_chunk: PositiveInt = Field(
        default=1024, description="tokens whose logits exist at one time"
    )
    checkpoint_every: PositiveInt = Field(
        default=100, description="steps between saved checkpoints"
    )
    keep_checkpoints: PositiveInt = 2

    @property
    def spared(self) -> tuple[Keep, ...]:
        """What the backward pass need not compute again, wherever it is kept."""
        return (*self.keep, *self.offload)

    @model_validator(mode="after")
    def _keep_means_something(self) -> Self:
        named = {"keep": self.keep, "offload": self.offload}
        for setting, names in named.items():
            if names and self.recompute != "layer":
                raise ValueError(
                    f"{setting} is {', '.join(names)} and recompute is {self.recompute}, which keeps "
                    f"everything; required: recompute=layer, or no {setting}"
                )
            if len(set(names)) < len(names):
                raise ValueError(f"{setting} names something twice: {', '.join(names)}")
        if both := [name for name in self.keep if name in self.offload]:
            raise ValueError(
                f"keep and offload both name {', '.join(both)}; required: in the device's memory (keep) "
                "or in the host's (offload)"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must be less than steps, {self.steps}"
            )
        return self


class EvaluateSection(Section):
    """What is looked at while training."""

    loss_every: PositiveInt | None = Field(
        default=None, description="steps between held-out losses"
    )
    sample_every: PositiveInt | None = Field(
        default=None, description="steps between sampled answers"
    )
    samples: PositiveInt = Field(default=8, description="held-out prompts that are answered")
    max_new_tokens: PositiveInt = 128
    pattern: str | None = Field(
        default=None,
        description="regular expression; the share of answers it matches is recorded as a score",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value


class MeshSection(Section):
    """How many devices carry what."""

    expert: PositiveInt = Field(default=1, description="devices that share the experts")
    data: PositiveInt = Field(default=1, description="replicas of the whole")
    rest: Rest = Field(
        default="sharded",
        description="weights that are not experts': a part on each device, gathered at use, or whole",
    )
    expert_buffer: Annotated[float, Field(ge=0.01, le=1000, allow_inf_nan=False)] = Field(
        default=1.5,
        description="rows an expert pass holds, times a device's mean; what is beyond takes more passes",
    )
    half_batches: Literal[1, 2] = Field(
        default=1,
        description="2: a device's rows in two parts, one travels while the other computes",
    )

    def problem_of(self, rows: int) -> str | None:
        """What a number of rows of all devices would have to be, if it cannot be spread over them."""
        count = self.expert * self.data
        devices, numbers = "mesh.expert × mesh.data", f"{self.expert} × {self.data}"
        if rows % count:
            same = "so that every device has as many rows"
            return f"a multiple of {devices} = {numbers} = {count}, {same}"
        if rows < count * self.half_batches:
            numbers += f" × {self.half_batches} = {count * self.half_batches}"
            return f"at least {devices} × mesh.half_batches = {numbers}"
        return None


class RunConfig(Section):
    """Everything a run decides. Frozen; made by `kimi_jax.config_file.load_config` or by hand."""

    run: RunSection
    model: ModelSection
    lora: LoraSection
    data: DataSection
    train: TrainSection
    evaluate: EvaluateSection = Field(default_factory=lambda: EvaluateSection())
    mesh: MeshSection = Field(default_factory=lambda: MeshSection())

    @model_validator(mode="after")
    def _rows_divide(self) -> Self:
        rows = self.train.micro_batch
        if problem := self.mesh.problem_of(rows):
            raise ValueError(f"train.micro_batch is {rows}; it must be {problem}")
        return self

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Self:
        wants = [k for k in ("loss_every", "sample_every") if getattr(self.evaluate, k) is not None]
        if wants and self.data.eval is None:
            raise ValueError(
                f"held-out rows are needed for evaluate.{' and evaluate.'.join(wants)}: "
                "set data.eval to a JSONL file"
            )
        return self
