"""Models for use: a checkpoint with or without an adapter, or a run's base with what it trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import NamedSharding

from kimi_jax.config import ActivationDtype, MeshSection, RunConfig
from kimi_jax.config_file import read_mesh
from kimi_jax.data.chat import Chat
from kimi_jax.errors import UserError
from kimi_jax.lora import Adapter, adapter_shapes, plan_adapters
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.layout import adapter_specs, check_layout
from kimi_jax.model.transformer import ModelDef, Transformer
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks, make_ranks
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.run_dir import check_base, read_config
from kimi_jax.training.structure import DTYPES
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
        return load_base(self.checkpoint, ranks=self.model_def.settings.ranks)

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
    mesh: MeshSection | Mapping[str, Any] | None = None,
    latent_norm_eps: float = 1e-6,
) -> Transformer:
    """Imports a checkpoint of the Kimi-K2 family.

    Args:
        checkpoint_dir: HF directory, or `demo` for the one in the package.
        adapter: PEFT directory in any layout that `export` writes.
        dtype: of activations; weights keep the checkpoint's.
        mesh: devices to spread over, as a configuration's section, `{"expert": 8}`; one if not given.
        latent_norm_eps: of the norms of MLA's latents; 1e-6 as HF, 1e-5 as vLLM and SGLang.

    Returns:
        A Flax NNX module: `model(tokens, positions=None, segment_ids=None)`, int32 [B, T] to float32
        logits [B, T, V].

    Raises:
        UserError: names, shapes, dtypes or an adapter that do not match, before a weight is read.
    """
    return load_parts(checkpoint_dir, adapter, dtype, latent_norm_eps, mesh).model


def load_parts(
    checkpoint_dir: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
    latent_norm_eps: float = 1e-6,
    mesh: MeshSection | Mapping[str, Any] | None = None,
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
    ranks = _ranks(mesh)
    specs = adapter_specs(plan)
    placed = {path: ranks.put(value, specs[path]) for path, value in adapters.items()}
    return _parts(checkpoint, plan, placed, dtype, latent_norm_eps, ranks)


def load_run(
    run: str | Path,
    dtype: str | None = None,
    mesh: MeshSection | Mapping[str, Any] | None = None,
) -> Parts:
    """A run's base, and the adapters of its newest checkpoint; also while the run goes on.

    The mesh need not be the run's own: one device if it is not given.
    """
    ranks = _ranks(mesh)
    config, checkpoint, plan, adapters = load_run_adapters(Path(run), ranks)
    model = config.model
    return _parts(checkpoint, plan, adapters, dtype or model.dtype, model.latent_norm_eps, ranks)


def _parts(
    checkpoint: Checkpoint,
    plan: Mapping[str, Adapter],
    adapters: Mapping[str, Any],
    dtype: str,
    latent_norm_eps: float,
    ranks: Ranks,
) -> Parts:
    check_layout(checkpoint.table, ranks)
    settings = ModelSettings(DTYPES[dtype], latent_norm_eps, ranks=ranks)
    return Parts(checkpoint, ModelDef(checkpoint.config, plan, settings), dict(adapters))


def _ranks(mesh: MeshSection | Mapping[str, Any] | None) -> Ranks:
    return make_ranks(mesh if isinstance(mesh, MeshSection) else read_mesh(mesh or {}))


def load_run_adapters(
    run: Path, ranks: Ranks = ONE_DEVICE
) -> tuple[RunConfig, Checkpoint, dict[str, Adapter], dict[str, Any]]:
    """What a run trained, without its base's weights: configuration, matched base, plan, adapters.

    The adapters are spread over `ranks`, whatever devices the run had.
    """
    config = read_config(run)
    checkpoint = open_checkpoint(resolve_checkpoint(config.model.checkpoint))
    check_base(run, fingerprint(checkpoint.directory))
    plan = plan_adapters(config.lora, checkpoint.table)
    specs = adapter_specs(plan)
    shardings = (
        {path: NamedSharding(ranks.mesh, spec) for path, spec in specs.items()}
        if ranks.mesh
        else None
    )
    with Checkpoints(run, read_only=True) as checkpoints:
        adapters = checkpoints.restore_adapters(adapter_shapes(plan), shardings)
    return config, checkpoint, plan, adapters


def export_run(run: Path, out_dir: Path, format: ExportFormat) -> Path:
    """Exports the newest checkpoint of a run; see `kimi_jax.weights.export`."""
    _, checkpoint, plan, adapters = load_run_adapters(run)
    export_adapter(out_dir, checkpoint, plan, adapters, format)
    return out_dir
