"""What the tests of this directory need. A module, because they also run without conftest files."""

import jax
import pytest

from kimi_jax.kernels.hopper import on_hopper

a_hopper_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu" or not on_hopper(), reason="needs a Hopper GPU"
)
