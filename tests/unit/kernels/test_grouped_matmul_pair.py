"""Two products of the same rows: what they share on a Hopper GPU, and that it changes nothing.

The expectation is the reference in fp32, twice. The interpreter runs the kernels but for the code by
lanes, which a pair has no more of than a product has.
"""

from collections import Counter

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from kimi_jax.kernels.grouped_matmul import mosaic
from kimi_jax.kernels.grouped_matmul.mosaic_body import Tuning
from kimi_jax.kernels.say import say_once
from kimi_jax.kernels.target import compiling_for
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight
from tests.unit.kernels.test_grouped_matmul import equations

GROUPS, IN, OUTS = 3, 256, (256, 384)
LAYERS, LAYER = 2, 1
SMALL = Tuning(widths=(16,), stages=3, blocks=2, turns=1)
# A group whose tail shares a copy with the next group's rows, an empty one, one of two tiles; then
# rows that are of no group.
SIZES, BEYOND = np.array([3, 0, 18], np.int32), 14
USED = int(SIZES.sum())
ADAPTERS = {
    "none": (None, None),
    "of the first, shared b": (((GROUPS, 5, IN), (OUTS[0], 5), 2.0), None),
    "shared a, another rank and scale": (
        ((5, IN), (GROUPS, OUTS[0], 5), 2.0),
        ((GROUPS, 12, IN), (GROUPS, OUTS[1], 12), 0.75),
    ),
}


def stack_of(rng, out):
    codes = rng.integers(-8, 8, (LAYERS, GROUPS, out, IN)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, (LAYERS, GROUPS, IN // 32, out)).astype(ml_dtypes.bfloat16)
    return PackedWeight(jnp.asarray(codes, jnp.int4), jnp.asarray(scale))


def operands(shapes):
    """Stacks, scales, and what is differentiated by; all in bf16's values."""
    rng = np.random.default_rng(0)
    stacks = tuple(stack_of(rng, out) for out in OUTS)
    x, *dys = (
        jnp.asarray(rng.normal(size=(USED + BEYOND, width)), jnp.bfloat16) for width in (IN, *OUTS)
    )

    def drawn(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32)

    factors = tuple(s and tuple(map(drawn, s[:2])) for s in shapes)
    return stacks, [s and s[2] for s in shapes], (x, factors), tuple(dys)


def adapters_of(factors, scales):
    return tuple(f and GroupedAdapter(*f, s) for f, s in zip(factors, scales, strict=True))


@pytest.mark.parametrize("low_known", [False, True], ids=["low made", "low known"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_products_and_gradients(case, low_known, quickly):
    """In the interpreter. Fails if a term, a layer or a column of the common projection is lost.

    With what adapters make of the rows made before, it is a constant and must change no gradient.
    """
    stacks, scales, (x, factors), dys = operands(ADAPTERS[case])
    sizes = jnp.asarray(SIZES)

    def pair(x, factors):
        adapters = adapters_of(factors, scales)
        low = mosaic.low_rank(x, sizes, adapters, SMALL, True) if low_known else None
        assert (low is None) == (not low_known or case == "none")
        return mosaic.grouped_matmul_pair(
            x, stacks, sizes, adapters, LAYER, SMALL, interpret=True, low=low
        )

    def twice(x, factors):
        return tuple(
            api.grouped_matmul(x, stack, sizes, adapter, "reference", LAYER)
            for stack, adapter in zip(stacks, adapters_of(factors, scales), strict=True)
        )

    def both(function, x, factors, dys):
        ys, pullback = jax.vjp(function, x, factors)
        return ys, pullback(dys)

    found = quickly(lambda *v: both(pair, *v), x, factors, dys)(x, factors, dys)
    assert {v.dtype.name for v in jax.tree.leaves(found[1][1])} <= {"float32"}
    exact = [
        x[:USED].astype(jnp.float32),
        factors,
        tuple(d[:USED].astype(jnp.float32) for d in dys),
    ]
    wanted = quickly(lambda *v: both(twice, *v), *exact)(*exact)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = (np.asarray(v.astype(jnp.float32)) for v in (one, other))
        one = one[: len(other)]  # rows that are of no group mean nothing
        assert np.linalg.norm(one - other) <= 4e-3 * np.linalg.norm(other)


def kernels_of(ranks):
    """Names of the kernels in both passes with how many there are, and the shapes of what is added."""
    stack = PackedWeight(
        jnp.zeros((2, IN, IN), jnp.int4), jnp.zeros((2, IN // 32, IN), jnp.bfloat16)
    )
    factors = tuple(r and (jnp.zeros((2, r, IN)), jnp.zeros((2, IN, r))) for r in ranks)

    def both(x, factors):
        def pair(x, factors):
            adapters = adapters_of(factors, (1.0, 1.0))
            sizes = jnp.array([3, 17], jnp.int32)
            return api.grouped_matmul_pair(x, (stack, stack), sizes, adapters, "pallas")

        ys, pullback = jax.vjp(pair, x, factors)
        return pullback(ys)

    traced = jax.make_jaxpr(both)(jnp.zeros((20, IN), jnp.bfloat16), factors)
    found = list(equations(traced.jaxpr))
    names = Counter(e.params["name"] for e in found if e.primitive.name == "mpmd_map")
    added = [e.outvars[0].aval.shape for e in found if e.primitive.name in ("add", "add_any")]
    return names, added


def test_known_low_rank_is_not_made_again():
    """The derivative of products whose `low` is given reads the rows for a factor's gradient only."""
    stack = PackedWeight(
        jnp.zeros((2, IN, IN), jnp.int4), jnp.zeros((2, IN // 32, IN), jnp.bfloat16)
    )
    factors = (jnp.zeros((2, 4, IN)), jnp.zeros((2, IN, 4)))
    sizes = jnp.array([3, 17], jnp.int32)

    def pair(x, low):
        adapters = (GroupedAdapter(*factors, 1.0),) * 2
        return api.grouped_matmul_pair(x, (stack, stack), sizes, adapters, "pallas", low=low)

    def both(x, low):
        ys, pullback = jax.vjp(pair, x, low)
        return pullback(ys)

    x, low = jnp.zeros((20, IN), jnp.bfloat16), jnp.zeros((20, 8), jnp.bfloat16)
    found = equations(jax.make_jaxpr(both)(x, low).jaxpr)
    names = Counter(e.params["name"] for e in found if e.primitive.name == "mpmd_map")
    assert "grouped_project" not in names
    assert names["grouped_project_pair"] == 1


def test_what_a_pair_shares():
    """One pass over the rows for both adapters each way, and no addition of two gradients."""
    names, added = kernels_of((3, 5))
    assert names == {
        "grouped_project": 1,
        "grouped_int4_forward": 2,
        "grouped_project_pair": 1,
        "grouped_factor_gradient": 3,  # both a; each b
        "grouped_int4_input_gradient_pair": 1,
    }
    assert (20, IN) not in added


@pytest.mark.parametrize(
    ("ranks", "few"), [((33, 32), 0), ((3, None), 1), ((None, None), 2)], ids=str
)
def test_pairs_that_are_two_products(ranks, few):
    """More ranks than one step of the contraction has; rows few enough for the kernel of few rows.

    Which is a single product's choice, and not the pair's.
    """
    names, added = kernels_of(ranks)
    assert names["grouped_int4_few_forward"] == names["grouped_int4_few_input_gradient"] == few
    assert names["grouped_int4_forward"] == names["grouped_int4_input_gradient"] == 2 - few
    assert not any(name.endswith("_pair") for name in names)
    assert (20, IN) in added


def test_the_reference_multiplies_twice():
    """On a CPU; equal bits, in both passes."""
    stacks, scales, (x, factors), dys = operands(ADAPTERS["shared a, another rank and scale"])
    x, dys, sizes = x[:USED], tuple(dy[:USED] for dy in dys), jnp.asarray(SIZES)

    def pair(x, factors):
        adapters = adapters_of(factors, scales)
        return api.grouped_matmul_pair(x, stacks, sizes, adapters, "auto", LAYER)

    def twice(x, factors):
        each = zip(stacks, adapters_of(factors, scales), strict=True)
        return tuple(api.grouped_matmul(x, s, sizes, a, "reference", LAYER) for s, a in each)

    ys, pullback = jax.vjp(pair, x, factors)
    wanted, other = jax.vjp(twice, x, factors)
    for found, value in zip(
        *map(jax.tree.leaves, ((ys, pullback(dys)), (wanted, other(dys)))), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(value))


def test_auto_takes_the_pair_only_if_both_products_would_be_pallas(monkeypatch):
    """On a Hopper GPU; fails if one product's operands decide for both."""
    say_once.cache_clear()
    ran = []
    monkeypatch.setattr(
        mosaic, "grouped_matmul_pair", lambda x, *_, **__: ran.append("pair") or (x, x)
    )
    monkeypatch.setattr(mosaic, "grouped_matmul", lambda x, *_, **__: ran.append("pallas") or x)
    packed = PackedWeight(
        jnp.zeros((2, IN, IN), jnp.int4), jnp.zeros((2, IN // 32, IN), jnp.bfloat16)
    )
    x, sizes = jnp.zeros((4, IN), jnp.bfloat16), jnp.array([2, 2], jnp.int32)
    with compiling_for("NVIDIA H200"):
        api.grouped_matmul_pair(x, (packed, packed), sizes)
        assert ran == ["pair"]
        api.grouped_matmul_pair(x, (packed, jnp.zeros((2, IN, IN), jnp.bfloat16)), sizes)
    assert ran == ["pair", "pallas"]


def test_refusals_are_those_of_a_product():
    """A named implementation runs or raises, for either product."""
    packed = PackedWeight(
        jnp.zeros((2, IN, IN), jnp.int4), jnp.zeros((2, IN // 32, IN), jnp.bfloat16)
    )
    x, sizes = jnp.zeros((4, IN), jnp.bfloat16), jnp.array([2, 2], jnp.int32)
    with pytest.raises(UserError, match="the weight is not packed int4"):
        api.grouped_matmul_pair(x, (packed, jnp.zeros((2, IN, IN))), sizes, impl="pallas")
    with pytest.raises(UserError, match="rows are float32; required: bfloat16"):
        api.grouped_matmul_pair(x.astype(jnp.float32), (packed, packed), sizes, impl="pallas")
    with pytest.raises(AssertionError, match="layer 1"):
        api.grouped_matmul_pair(x, (packed, packed), sizes, layer=1)


def test_stacks_have_no_gradient_and_no_copy():
    """As for one product: with 60 layers a stack is most of the memory there is."""
    layers, rank = 3, 5
    stacks = tuple(
        PackedWeight(
            jnp.zeros((layers, 2, IN, IN), jnp.int4),
            jnp.zeros((layers, 2, IN // 32, IN), jnp.bfloat16),
        )
        for _ in range(2)
    )

    def total(x, factors, stacks):
        @jax.checkpoint
        def one(x, each):
            layer, *factors = each
            sizes = jnp.array([3, 1], jnp.int32)
            adapters = adapters_of(factors, (1.0, 2.0))
            y, z = api.grouped_matmul_pair(x, stacks, sizes, adapters, "pallas", layer)
            return y * z, None

        x, _ = jax.lax.scan(one, x, (jnp.arange(layers), *factors))
        return x.astype(jnp.float32).sum()

    factors = ((jnp.zeros((layers, 2, rank, IN)), jnp.zeros((layers, 2, IN, rank))),) * 2
    gradient = jax.grad(total, argnums=(0, 1))
    traced = jax.make_jaxpr(gradient)(jnp.zeros((4, IN), jnp.bfloat16), factors, stacks)
    shapes = {array.shape for stack in stacks for array in stack}
    made = {
        equation.primitive.name
        for equation in equations(traced.jaxpr)
        for value in equation.outvars
        if value.aval.shape in shapes
    }
    assert made <= {"bitcast_convert_type"}
