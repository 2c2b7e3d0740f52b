"""Models for use: a checkpoint with or without an adapter, or a run's base with what it trained."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kimi_jax.config import ActivationDtype, RunConfig
from kimi_jax.data.chat import Chat
from kimi_jax.errors import UserError
from kimi_jax.lora import Adapter, adapter_shapes, plan_adapters
from kimi_jax.model.transformer import ModelDef, ModelSettings, Transformer
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.run_dir import check_base, read_config
from kimi_jax.training.trainer import DTYPES
from kimi_jax.weights.checkpoint import Checkpoint, open_checkpoint, resolve_checkpoint
from kimi_jax.weights.export import ExportFormat, export_adapter
from kimi_jax.weights.import_peft import read_peft
from kimi_jax.weights.load import load_base
from kimi_jax.weights.reader import fingerprint


@dataclass(frozen=True)
class Parts:
    """A matched checkpoint with its structure and an adapter's values; the base is read when it is used."""

    checkpoint: Checkpoint
    model_def: ModelDef
    adapters: dict[str, Any]

    @cached_property
    def base(self) -> dict[str, Any]:
        """Weights of the base by path, imported at the first use: what else is wrong shows before."""
        return load_base(self.checkpoint)

    @property
    def model(self) -> Transformer:
        """The Flax model."""
        return self.model_def.bind(self.base, self.adapters)

    @cached_property
    def chat(self) -> Chat:
        """Tokenizer and template."""
        return Chat.from_checkpoint(self.checkpoint.directory)


def load(
    checkpoint_dir: str | Path,
    adapter: str | Path | None = None,
    dtype: ActivationDtype = "bfloat16",
    mesh: Any = None,
    latent_norm_eps: float = 1e-6,
) -> Transformer:
    """Imports a checkpoint of the Kimi-K2 family.

    Args:
        checkpoint_dir: HF directory, or `demo` for the one in the package.
        adapter: PEFT directory in any layout that `export` writes.
        dtype: of activations; weights keep the checkpoint's.
        mesh: devices to spread over. This version runs on one: None.
        latent_norm_eps: of the norms of MLA's latents; 1e-6 as HF, 1e-5 as vLLM and SGLang.

    Returns:
        A Flax NNX module: `model(tokens, positions=None, segment_ids=None)`, int32 [B, T] to float32
        logits [B, T, V].

    Raises:
        UserError: names, shapes, dtypes or an adapter that do not match, before a weight is read.
    """
    if mesh is not None:
        raise UserError("mesh is given; this version runs on one device: leave it None")
    return load_parts(checkpoint_dir, adapter, dtype, latent_norm_eps).model


def load_parts(
    checkpoint_dir: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
    latent_norm_eps: float = 1e-6,
) -> Parts:
    """The same as `load`, unbound and without the base's weights yet."""
    if not latent_norm_eps > 0:
        raise UserError(f"latent_norm_eps is {latent_norm_eps}; required: above 0")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; required: {' or '.join(DTYPES)}")
    checkpoint = open_checkpoint(resolve_checkpoint(str(checkpoint_dir)))
    plan, adapters = {}, {}
    if adapter is not None:
        plan, adapters = read_peft(Path(adapter), checkpoint.config, checkpoint.table)
    settings = ModelSettings(DTYPES[dtype], latent_norm_eps)
    return Parts(checkpoint, ModelDef(checkpoint.config, plan, settings), dict(adapters))


def load_run(run: str | Path, dtype: str | None = None) -> Parts:
    """A run's base, and the adapters of its newest checkpoint; also while the run goes on."""
    config, checkpoint, plan, adapters = load_run_adapters(Path(run))
    settings = ModelSettings(DTYPES[dtype or config.model.dtype], config.model.latent_norm_eps)
    return Parts(checkpoint, ModelDef(checkpoint.config, plan, settings), adapters)


def load_run_adapters(
    run: Path,
) -> tuple[RunConfig, Checkpoint, dict[str, Adapter], dict[str, Any]]:
    """What a run trained, without its base's weights: configuration, matched base, plan, adapters."""
    config = read_config(run)
    checkpoint = open_checkpoint(resolve_checkpoint(config.model.checkpoint))
    check_base(run, fingerprint(checkpoint.directory))
    plan = plan_adapters(config.lora, checkpoint.table)
    with Checkpoints(run, read_only=True) as checkpoints:
        return config, checkpoint, plan, checkpoints.restore_adapters(adapter_shapes(plan))


def export_run(run: Path, out_dir: Path, format: ExportFormat) -> Path:
    """Exports the newest checkpoint of a run; see `kimi_jax.weights.export`."""
    _, checkpoint, plan, adapters = load_run_adapters(run)
    return export_adapter(out_dir, checkpoint, plan, adapters, format)
