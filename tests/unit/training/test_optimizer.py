"""Learning-rate schedules, number by number, and clipping."""

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import TrainSection
from kimi_jax.training.optimizer import learning_rates, make_optimizer


def settings(**changes):
    values = {
        "steps": 6,
        "learning_rate": 8.0,
        "micro_batch": 1,
        "accumulate": 1,
        "sequence_length": 8,
        "warmup_steps": 2,
        "final_learning_rate_fraction": 0.5,
    }
    return TrainSection(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"warmup_steps": 0}, [8, 8, 8, 8, 8, 8]),
        ({}, [4, 8, 8, 8, 8, 8]),
        ({"schedule": "linear"}, [4, 8, 8, 7, 6, 5]),
        ({"schedule": "linear", "warmup_steps": 0, "steps": 4}, [8, 7, 6, 5]),
        ({"schedule": "cosine"}, [4, 8, 8, 6 + 2 * 0.5**0.5, 6, 6 - 2 * 0.5**0.5]),
        ({"schedule": "linear", "warmup_steps": 1}, [8, 8, 7.2, 6.4, 5.6, 4.8]),
    ],
)
def test_learning_rates(changes, rates):
    """Guards a first step without a rate, and a schedule that ends early or late."""
    chosen = settings(**changes)
    schedule = learning_rates(chosen)
    found = [float(np.asarray(schedule(step))) for step in range(chosen.steps)]
    np.testing.assert_allclose(found, rates, rtol=1e-6)


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (None, 5.0), (10.0, 5.0)])
def test_clipping_by_the_global_norm(clip, norm):
    """AdamW's first moment shows the gradient that reached it: clipped over all factors together."""
    optimizer = make_optimizer(settings(clip_norm=clip))
    adapters = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}
    _, state = optimizer.update(gradients, optimizer.init(adapters), adapters)
    adam = (state if clip is None else state[1])[0]
    moments = np.concatenate([adam.mu["a"], adam.mu["b"]]) / 0.1
    np.testing.assert_allclose(moments, np.array([3, 4]) * norm / 5, rtol=1e-6)
