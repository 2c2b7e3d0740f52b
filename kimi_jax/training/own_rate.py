"""Updates with a learning rate that the caller names, for a schedule of one's own."""

import math
from collections.abc import Callable

from jaxtyping import Array

from kimi_jax.config import TrainSection
from kimi_jax.errors import UserError
from kimi_jax.training.optimizer import make_optimizer
from kimi_jax.training.step import Gradients, StepMetrics, TrainState, make_update


def check_rate(learning_rate: float) -> float:
    """Refuses what is not a positive number; a bad rate would reach every adapter."""
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UserError(f"learning_rate is {learning_rate}; required: a number above 0")
    return float(learning_rate)


def make_update_at(
    settings: TrainSection,
) -> Callable[[TrainState, Gradients, Array], tuple[TrainState, StepMetrics]]:
    """`(state, accumulated gradients, rate) -> (state, metrics)`, the rate an argument. Not jitted."""

    def update(
        state: TrainState, gradients: Gradients, rate: Array
    ) -> tuple[TrainState, StepMetrics]:
        return make_update(make_optimizer(settings, lambda _: rate))(state, gradients)

    return update
