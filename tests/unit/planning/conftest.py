"""Kimi-K2-Thinking on eight GPUs: the repository's own configuration, and its architecture."""

from pathlib import Path

import pytest

from kimi_jax.config_file import load_config
from kimi_jax.model.config import load_model_config

ROOT = Path(__file__).parents[3]
ARCHITECTURE = ROOT / "configs" / "k2_thinking"
RECIPE = ROOT / "configs" / "k2_thinking_8xh200.yaml"


@pytest.fixture(scope="session")
def model():
    return load_model_config(ARCHITECTURE)


@pytest.fixture(scope="session")
def on_eight():
    """`on_eight(override, …)`: the run with 4 rows a GPU that keeps layers' inputs only, changed."""

    def configure(*overrides):
        plain = ["train.micro_batch=32", "train.keep=[]", "mesh.expert_buffer=1.5"]
        plain.append("mesh.half_batches=1")
        return load_config(RECIPE, [f"model.checkpoint={ARCHITECTURE}", *plain, *overrides])

    return configure
