"""Kimi-K2-Thinking on eight GPUs: the repository's own configuration, and its architecture."""

from pathlib import Path

import pytest

from kimi_jax.config_file import load_config
from kimi_jax.model.config import load_model_config

ROOT = Path(__file__).parents[3]
ARCHITECTURE = ROOT / "configs" / "k2_thinking"


@pytest.fixture(scope="session")
def model():
    return load_model_config(ARCHITECTURE)


@pytest.fixture(scope="session")
def on_eight():
    """`on_eight(override, …)`: the configuration of the run, changed."""

    def configure(*overrides):
        path = ROOT / "configs" / "k2_thinking_8xh200.yaml"
        return load_config(path, [f"model.checkpoint={ARCHITECTURE}", *overrides])

    return configure
