"""Implementations of the grouped matmul, each against the same loops."""

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight
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


def equations(jaxpr):
    """Of a program and of all programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inside in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inside)


@pytest.mark.parametrize("impl", ["reference", "pallas", "scratch"])
def test_a_stack_has_no_gradient_and_no_copy(impl):
    """Nothing of the stack's shape is computed on the way to gradients, zeros neither.

    With 60 layers a stack is most of the memory there is.
    """
    layers, groups, size = 3, 2, 256
    stack = PackedWeight(
        jnp.zeros((layers, groups, size, size), jnp.int4),
        jnp.zeros((layers, groups, size // 32, size), jnp.bfloat16),
    )

    def total(x, factors, stack):
        @jax.checkpoint
        def one(x, each):
            layer, a, b = each
            adapter = GroupedAdapter(a, b, 1.0)
            sizes = jnp.array([3, 1], jnp.int32)
            return api.grouped_matmul(x, stack, sizes, adapter, impl=impl, layer=layer), None

        x, _ = jax.lax.scan(one, x, (jnp.arange(layers), *factors))
        return x.astype(jnp.float32).sum()

    factors = jnp.zeros((layers, groups, 5, size)), jnp.zeros((layers, groups, size, 5))
    gradient = jax.grad(total, argnums=(0, 1))
    traced = jax.make_jaxpr(gradient)(jnp.zeros((4, size), jnp.bfloat16), factors, stack)
    shapes = {array.shape for array in stack}
    made = {
        equation.primitive.name
        for equation in equations(traced.jaxpr)
        for value in equation.outvars
        if value.aval.shape in shapes
    }
    assert made <= {"bitcast_convert_type"}  # which is another name for the same bytes
