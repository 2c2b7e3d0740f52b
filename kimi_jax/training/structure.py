"""The structure of a run's model, from its configuration."""

import jax.numpy as jnp

from kimi_jax.config import RunConfig
from kimi_jax.lora import AdapterPlan, plan_adapters
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.params import weight_table
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.ranks import Ranks

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Of activations, by the names that `model.dtype` takes."""


def model_of(
    config: RunConfig, model: ModelConfig, ranks: Ranks, plan: AdapterPlan | None = None
) -> ModelDef:
    """A run's model on these ranks.

    Args:
        config: of the run.
        model: the checkpoint's.
        ranks: may be without devices, or on absent ones.
        plan: what `config.lora` adapts in the model, if it is at hand.

    Raises:
        UserError: adapter targets that the model does not have.
    """
    settings = ModelSettings(
        DTYPES[config.model.dtype],
        config.model.latent_norm_eps,
        config.train.recompute,
        tuple(config.train.keep),
        ranks,
        config.mesh.half_batches,
        tuple(config.train.offload),
    )
    if plan is None:
        plan = plan_adapters(config.lora, weight_table(model))
    return ModelDef(model, plan, settings)
