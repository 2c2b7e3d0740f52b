"""The compiled functions of a trainer; each is traced when it is first used."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.config import TrainSection
from kimi_jax.kernels.hopper import compiler_options
from kimi_jax.model.transformer import ModelDef
from kimi_jax.training.kept import KeptProgram
from kimi_jax.training.optimizer import make_optimizer
from kimi_jax.training.own_rate import make_update_at
from kimi_jax.training.step import make_gradients, make_loss, make_train_step, make_update


class Programs:
    """See `kimi_jax.training.step` for what each computes. Arguments named there are donated here.

    Attributes:
        optimizer: of the settings.
        train_step: `make_train_step`, kept between processes if JAX is told where.
    """

    def __init__(self, model_def: ModelDef, settings: TrainSection) -> None:
        self.optimizer = make_optimizer(settings)
        self._model_def = model_def
        self._settings = settings
        # Made here and not when it is first used: it notes the sources that it is made of.
        step = make_train_step(model_def, self.optimizer, settings.loss_chunk)
        self.train_step = KeptProgram(step, "train_step")

    @cached_property
    def gradients(self) -> Any:
        """`make_gradients`."""
        return jax.jit(
            make_gradients(self._model_def, self._settings.loss_chunk),
            compiler_options=compiler_options(),
        )

    @cached_property
    def add(self) -> Any:
        """The sum of two trees; the first is donated."""
        return jax.jit(lambda total, one: jax.tree.map(jnp.add, total, one), donate_argnums=0)

    @cached_property
    def update(self) -> Any:
        """`make_update`; the state is donated."""
        return jax.jit(make_update(self.optimizer), donate_argnums=0)

    @cached_property
    def update_at(self) -> Any:
        """`make_update_at`; the state is donated."""
        return jax.jit(make_update_at(self._settings), donate_argnums=0)

    @cached_property
    def loss(self) -> Any:
        """`make_loss`."""
        return jax.jit(make_loss(self._model_def, self._settings.loss_chunk))
