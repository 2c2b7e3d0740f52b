"""Implementations of head and cross-entropy, each against full logits in float64."""

import math
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from kimi_jax.kernels.linear_cross_entropy.fused import VocabularySplit
from kimi_jax.kernels.types import LinearAdapter
from tests.unit.jaxprs import all_equations

TOKENS, WIDTH, VOCABULARY, RANK, SCALE = 10, 8, 50, 3, 2.0


def draw(tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY):
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(tokens, width)),
        "head": rng.normal(size=(vocabulary, width)),
        "targets": rng.integers(0, vocabulary, tokens).astype(np.int32),
        "weights": np.resize([1.0, 0.0, 0.5], tokens),
        "a": rng.normal(size=(RANK, width)),
        "b": rng.normal(size=(vocabulary, RANK)),
    }


def expected(case, adapted):
    """Loss, and its gradients with respect to hidden, a and b."""
    h, a, b = case["hidden"], case["a"], case["b"]
    matrix = case["head"] + (SCALE * b @ a if adapted else 0)
    logits = h @ matrix.T
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    place = np.arange(len(h)), case["targets"]
    loss = -(case["weights"] * np.log(probabilities[place])).sum()
    d_logits = probabilities * case["weights"][:, None]
    d_logits[place] -= case["weights"]
    d_matrix = SCALE * d_logits.T @ h
    return loss, (d_logits @ matrix, b.T @ d_matrix, d_matrix @ a.T)


class CrossEntropyContract:
    """Inherit, and name the implementation in `impl`."""

    impl: ClassVar[str]

    def loss(self, case, adapted, chunk):
        """A function of hidden, a and b, and its fp32 arguments."""
        case = {
            name: jnp.asarray(v, jnp.int32 if name == "targets" else jnp.float32)
            for name, v in case.items()
        }

        def function(hidden, a, b):
            adapter = LinearAdapter(a, b, SCALE) if adapted else None
            return api.linear_cross_entropy(
                hidden,
                case["head"],
                case["targets"],
                case["weights"],
                adapter,
                chunk=chunk,
                impl=self.impl,
            )

        return function, (case["hidden"], case["a"], case["b"])

    @pytest.mark.parametrize("adapted", [False, True], ids=["frozen head", "adapted head"])
    @pytest.mark.parametrize("chunk", [4, 5, 64], ids=["uneven", "even", "one larger chunk"])
    def test_loss_and_gradients(self, quickly, adapted, chunk):
        """Rows that pad the last chunk must count for nothing; weights multiply, not mask."""
        function, arguments = self.loss(draw(), adapted, chunk)
        gradient = jax.value_and_grad(function, argnums=(0, 1, 2))
        loss, gradients = quickly(gradient, *arguments)(*arguments)
        wanted_loss, wanted = expected(draw(), adapted)
        assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
        compared = 3 if adapted else 1
        for found, want in list(zip(gradients, wanted, strict=True))[:compared]:
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)

    def test_no_token_counts(self, quickly):
        case = draw() | {"weights": np.zeros(TOKENS)}
        function, arguments = self.loss(case, True, 4)
        gradient = jax.value_and_grad(function, argnums=(0, 1, 2))
        loss, gradients = quickly(gradient, *arguments)(*arguments)
        assert float(loss) == 0
        assert not any(np.asarray(g).any() for g in gradients)

    def test_weight_zero_hides_an_infinite_loss(self):
        """What is not part of the loss cannot make it NaN: 0 · inf would."""
        case = draw()
        case["hidden"][1] = np.inf
        assert case["weights"][1] == 0
        function, arguments = self.loss(case, False, 4)
        assert np.isfinite(float(function(*arguments)))

    def test_full_logits_never_exist(self, quickly):
        """Neither forward nor backward: without recomputation the chunks' logits would be stacked."""
        tokens, width, vocabulary, chunk = 96, 8, 300, 8
        function, arguments = self.loss(draw(tokens, width, vocabulary), True, chunk)
        gradient = jax.value_and_grad(function, argnums=(0, 1, 2))
        largest = max(
            math.prod(variable.aval.shape)
            for equation in all_equations(jax.make_jaxpr(gradient)(*arguments))
            for variable in equation.outvars
        )
        assert chunk * vocabulary <= largest < tokens * vocabulary / 2
        memory = quickly(gradient, *arguments).memory_analysis()
        assert memory.temp_size_in_bytes < tokens * vocabulary * 4

    def test_frozen_head_gets_no_gradient(self):
        """No product in the backward pass has the shape of the head."""
        case = draw(96, 8, 300)
        function, arguments = self.loss(case, True, 16)
        jaxpr = jax.make_jaxpr(jax.grad(function, argnums=(0, 1, 2)))(*arguments)
        products = [e for e in all_equations(jaxpr) if e.primitive.name == "dot_general"]
        assert products
        assert all(sorted(e.outvars[0].aval.shape) != [8, 300] for e in products)


class TestReference(CrossEntropyContract):
    impl = "reference"


class TestFused(CrossEntropyContract):
    impl = "fused"

    def test_logits_are_formed_once(self):
        """Loss and gradient cost two products with the head, not three."""
        case = draw(96, 8, 300)
        function, arguments = self.loss(case, False, 16)
        jaxpr = jax.make_jaxpr(jax.value_and_grad(function))(*arguments)
        products = [e for e in all_equations(jaxpr) if e.primitive.name == "dot_general"]
        assert len(products) == 2

    def test_no_gradient_where_none_is_asked_for(self):
        function, arguments = self.loss(draw(96, 8, 300), True, 16)
        jaxpr = jax.make_jaxpr(function)(*arguments)
        products = [e for e in all_equations(jaxpr) if e.primitive.name == "dot_general"]
        assert len(products) == 2  # hidden · aᵀ, and of both beside each other · [W, b]ᵀ

    def test_cotangent_is_applied(self, quickly):
        """A mean divides the sum: the gradient made with the loss has to be divided too."""
        function, arguments = self.loss(draw(), True, 4)
        once = quickly(jax.grad(function, argnums=(0, 1, 2)), *arguments)(*arguments)

        def quarter(*arguments):
            return function(*arguments) / 4

        found = quickly(jax.grad(quarter, argnums=(0, 1, 2)), *arguments)(*arguments)
        for value, whole in zip(found, once, strict=True):
            np.testing.assert_allclose(value, whole / 4, rtol=1e-6)


def test_reference_refuses_a_split():
    case = draw()
    with pytest.raises(UserError, match="split"):
        api.linear_cross_entropy(
            *(jnp.asarray(case[name]) for name in ("hidden", "head", "targets", "weights")),
            impl="reference",
            split=VocabularySplit("x", 0),
        )


def test_split_over_devices():
    """Loss and gradients of eight devices' parts are those of the whole; see `split_cross_entropy`."""
    subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.split_cross_entropy"],
        cwd=Path(__file__).parents[3],
        timeout=300,
        check=True,
    )


def test_head_logits(quickly):
    case = {name: jnp.asarray(v, jnp.float32) for name, v in draw().items()}
    adapter = LinearAdapter(case["a"], case["b"], SCALE)
    logits = api.head_logits(case["hidden"].reshape(2, 5, WIDTH), case["head"], adapter)
    exact = draw()
    wanted = exact["hidden"] @ (exact["head"] + SCALE * exact["b"] @ exact["a"]).T
    np.testing.assert_allclose(logits.reshape(TOKENS, -1), wanted, rtol=1e-4, atol=1e-4)
