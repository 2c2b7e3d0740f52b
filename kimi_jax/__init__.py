"""kimi_jax: fine-tuning of Kimi-K2-Thinking and its relatives in JAX, with 4-bit experts left packed.

model = kimi_jax.load(checkpoint_dir, adapter=None)    # HF directory in, Flax model out
logits = model(tokens)                                 # int32 [B, T] -> float32 [B, T, V]
trainer = kimi_jax.Trainer("configs/demo.yaml")        # forward_backward, optim_step, sample, …
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_jax.config import RunConfig
    from kimi_jax.errors import UserError
    from kimi_jax.training.assemble import load
    from kimi_jax.training.trainer import Trainer

__all__ = ["RunConfig", "Trainer", "UserError", "load"]

_HOMES = {
    "RunConfig": "kimi_jax.config",
    "Trainer": "kimi_jax.training.trainer",
    "UserError": "kimi_jax.errors",
    "load": "kimi_jax.training.assemble",
}


def __getattr__(name: str) -> Any:
    # Names are fetched when they are first used, so that importing one part of the package does not
    # import all of it.
    if name not in _HOMES:
        raise AttributeError(f"module 'kimi_jax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
