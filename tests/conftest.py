"""Checks the package's jaxtyping annotations wherever pytest runs it, and finds the goldens."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.typecheck import check_arrays

install_import_hook("kimi_jax", f"{check_arrays.__module__}.{check_arrays.__name__}")


@pytest.fixture(scope="session")
def golden_dir():
    """What foreign libraries computed; tests/parity/README.md describes it."""
    return Path(__file__).parent / "golden"
