"""Implementations of the grouped matmul, each against the same loops."""

import jax.numpy as jnp
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from tests.unit.kernels.grouped_matmul_contract import GroupedMatmulContract


class TestReference(GroupedMatmulContract):
    impl = "reference"


def test_unknown_implementation_is_refused():
    """A named implementation runs or raises; it is never replaced by another in silence."""
    # Past the annotation, which only tests enforce.
    with pytest.raises(UserError, match=r"impl is 'fast'; required: one of auto, reference"):
        api._check("fast", api.GroupedImplementation)


def test_wrong_shapes_are_refused_by_the_annotations():
    """Fails if annotations are not checked under pytest: the product itself would be computed."""
    weight = jnp.zeros((2, 8, 4))
    with pytest.raises(Exception, match="Type-check error") as caught:
        api.grouped_matmul(jnp.zeros((3, 4)), weight[0], jnp.array([1, 2]))
    assert "TypeCheckError" in type(caught.value).__name__
