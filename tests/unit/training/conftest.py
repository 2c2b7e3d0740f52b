"""One tiny checkpoint and one trainer for all tests of training: compiling is what costs time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import Trainer
from kimi_jax.lora import init_adapters
from kimi_jax.model.decode import Sampling, generate
from kimi_jax.training.assemble import load_parts
from kimi_jax.training.optimizer import make_optimizer
from kimi_jax.training.step import init_state
from tests.unit.support import END, tiny_run, write_rows, write_tiny_checkpoint


def set_adapters(trainer, adapters):
    """Gives the trainer other adapters, and their optimizer its first state."""
    arrays = {path: jnp.asarray(value, jnp.float32) for path, value in adapters.items()}
    trainer.state = init_state(arrays, make_optimizer(trainer.config.train))


def greedy(parts, prompts, stop=(END,)):
    """The likeliest continuations by a trainer's model, or by one that was loaded."""
    adapters = parts.state.adapters if isinstance(parts, Trainer) else parts.adapters
    return generate(parts.model_def, parts.base, adapters, prompts, 8, Sampling(), stop)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a tiny checkpoint that no test may change."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def light_compiler():
    """Compiles in two thirds of the time: these tests compare programs, they do not time them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def base_parts(tiny, light_compiler):
    """The tiny checkpoint without an adapter."""
    return load_parts(tiny, dtype="float32")


@pytest.fixture(scope="session")
def shared_trainer(tiny, tmp_path_factory, light_compiler):
    folder = tmp_path_factory.mktemp("trainer")
    write_rows(folder / "train.jsonl")
    return Trainer(tiny_run(folder, tiny))


@pytest.fixture
def trainer(shared_trainer):
    """The trainer at its beginning: no steps, nothing accumulated, adapters whose B is zero."""
    set_adapters(shared_trainer, init_adapters(shared_trainer.plan, seed=3))
    shared_trainer._accumulated = None
    shared_trainer._saved_step = None
    return shared_trainer


@pytest.fixture
def noisy(trainer):
    """The same with adapters that change the model: B is not zero."""
    rng = np.random.default_rng(0)
    shapes = {path: value.shape for path, value in trainer.state.adapters.items()}
    set_adapters(
        trainer, {path: 0.1 * rng.standard_normal(shape) for path, shape in shapes.items()}
    )
    return trainer
