"""Twenty optimizer steps against peft and torch's AdamW, through the train step itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import TrainSection
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.transformer import ModelDef
from kimi_jax.training.optimizer import learning_rates, make_optimizer
from kimi_jax.training.step import init_state, make_train_step
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.import_peft import read_peft
from kimi_jax.weights.load import load_base

STEPS = 20
SETTINGS = TrainSection(
    steps=STEPS,
    learning_rate=2e-3,
    micro_batch=3,
    accumulate=1,
    sequence_length=16,
    warmup_steps=5,
    schedule="cosine",
    final_learning_rate_fraction=0.1,
    weight_decay=0.01,
    clip_norm=1.0,
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "k2_thinking_steps.npz")


def test_learning_rates(golden):
    schedule = learning_rates(SETTINGS)
    ours = [float(np.asarray(schedule(step))) for step in range(STEPS)]
    np.testing.assert_allclose(ours, golden["learning_rate"], rtol=1e-6)


def test_losses_and_gradient_norms(golden, golden_dir):
    checkpoint = open_checkpoint(golden_dir / "checkpoints" / "k2_thinking")
    plan, adapters = read_peft(
        golden_dir / "adapters" / "k2_thinking", checkpoint.config, checkpoint.table
    )
    model_def = ModelDef(checkpoint.config, plan, ModelSettings(jnp.float32))
    optimizer = make_optimizer(SETTINGS)
    step = make_train_step(model_def, optimizer, chunk=32)
    state = init_state(adapters, optimizer)
    base = load_base(checkpoint)
    length = golden["tokens"].shape[-1]
    losses, norms = [], []
    for tokens, weights in zip(golden["tokens"], golden["loss_weights"], strict=True):
        batch = {
            "tokens": tokens[None],
            "loss_weights": weights[None],
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)[None],
            "segment_ids": np.ones_like(tokens)[None],
        }
        state, metrics = step(state, base, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    # 1e-4 is asked for; fp32 against fp64 of the same steps differs by 6e-6 (tests/parity/README.md).
    np.testing.assert_allclose(losses, golden["loss"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(norms, golden["grad_norm"], rtol=1e-3)
    assert int(state.step) == STEPS
    assert jax.tree.leaves(state.adapters)[0].dtype == jnp.float32
