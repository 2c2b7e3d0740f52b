"""Implementations of linear layers with adapters, each against the equation in float64."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from kimi_jax.kernels.types import LinearAdapter
from tests.unit.jaxprs import all_equations

TOKENS = (2, 5)
OUTS = (20, 6)
# Wider and narrower than the outputs together: which side adapters' terms join on depends on it.
WIDTHS = {"widening": 12, "narrowing": 40}
# Rank and scale of each weight's adapter.
ADAPTERS = {
    "none": (None, None),
    "the second": (None, (3, 2.0)),
    "both, unlike": ((3, 2.0), (5, 0.75)),
}


def draw(width, adapters):
    """x, weights, factors and cotangents in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*TOKENS, width))
    weights = tuple(rng.normal(size=(out, width)) for out in OUTS)
    factors = tuple(
        one and (rng.normal(size=(one[0], width)), rng.normal(size=(out, one[0])))
        for out, one in zip(OUTS, adapters, strict=True)
    )
    dys = tuple(rng.normal(size=(*TOKENS, out)) for out in OUTS)
    return x, weights, factors, dys


def expected(x, weights, factors, dys, adapters):
    """Products, and the gradients of x and of the factors."""
    ys, dx, gradients = [], 0, []
    for weight, pair, dy, one in zip(weights, factors, dys, adapters, strict=True):
        scale = one and one[1]
        matrix = weight if pair is None else weight + scale * pair[1] @ pair[0]
        ys.append(x @ matrix.T)
        dx = dx + dy @ matrix
        d_matrix = np.einsum("bto,bti->oi", dy, x)
        gradients.append(pair and (scale * pair[1].T @ d_matrix, scale * d_matrix @ pair[0].T))
    return tuple(ys), dx, tuple(gradients)


class LinearContract:
    """Inherit, and name the implementation in `impl`."""

    impl: ClassVar[str]

    def run(self, case, adapters, dtype, quickly):
        """The same as `expected`, by the implementation."""
        x, weights, factors, dys = case
        x, dys = jax.tree.map(lambda v: jnp.asarray(v, dtype), (x, dys))
        weights, factors = jax.tree.map(jnp.float32, (weights, factors))

        def function(x, factors):
            given = tuple(
                pair and LinearAdapter(*pair, one[1])
                for pair, one in zip(factors, adapters, strict=True)
            )
            return api.linear(x, weights, given, self.impl)

        def both(x, factors, dys):
            ys, pullback = jax.vjp(function, x, factors)
            return ys, *pullback(dys)

        return quickly(both, x, factors, dys)(x, factors, dys)

    @pytest.mark.parametrize("adapted", ADAPTERS)
    @pytest.mark.parametrize("shape", WIDTHS)
    def test_products_and_gradients(self, quickly, shape, adapted):
        """Fails if a term is lost, scaled twice, or taken from another product's columns."""
        adapters = ADAPTERS[adapted]
        case = draw(WIDTHS[shape], adapters)
        found = self.run(case, adapters, jnp.float32, quickly)
        wanted = expected(*case, adapters)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())

    @pytest.mark.parametrize("shape", WIDTHS)
    def test_bf16(self, quickly, shape):
        """Rounded products: 3 roundings of up to 2⁻⁹ each, of the largest term; gradients are fp32."""
        adapters = ADAPTERS["both, unlike"]
        case = jax.tree.map(
            lambda v: np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64),
            draw(WIDTHS[shape], adapters),
        )
        found = self.run(case, adapters, jnp.bfloat16, quickly)
        assert {v.dtype for v in jax.tree.leaves(found[2])} == {jnp.dtype(jnp.float32)}
        assert {v.dtype for v in jax.tree.leaves(found[:2])} == {jnp.dtype(jnp.bfloat16)}
        wanted = expected(*case, adapters)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert np.abs(np.asarray(one, np.float64) - other).max() <= 2**-6 * np.abs(other).max()


class TestReference(LinearContract):
    impl = "reference"


class TestJoined(LinearContract):
    impl = "joined"

    def test_one_product_gives_the_gradient_of_rows(self):
        """Of narrow outputs: no array as wide as the rows but it, so no sum of several."""
        case = draw(WIDTHS["narrowing"], ADAPTERS["both, unlike"])
        x, weights, factors, dys = jax.tree.map(jnp.float32, case)

        def gradient(x, dys):
            given = tuple(LinearAdapter(*pair, 1.0) for pair in factors)
            return jax.vjp(lambda x: api.linear(x, weights, given, "joined"), x)[1](dys)

        rows = int(np.prod(TOKENS)), WIDTHS["narrowing"]
        made = [
            equation.primitive.name
            for equation in all_equations(jax.make_jaxpr(gradient)(x, dys))
            if equation.outvars and equation.outvars[0].aval.shape == rows
        ]
        assert made.count("dot_general") == 1
        assert not {"add", "add_any"} & set(made)


def test_unknown_implementation():
    with pytest.raises(UserError, match="impl is 'fast'"):
        api.linear(jnp.zeros((2, 4)), (jnp.zeros((3, 4)),), (None,), impl="fast")  # pyright: ignore[reportArgumentType]
