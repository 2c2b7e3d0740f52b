"""Cross-entropy split over eight simulated devices against the whole, in a process of its own.

Run by test_linear_cross_entropy: the number of CPU devices is fixed when JAX starts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kimi_jax.kernels import api
from kimi_jax.kernels.linear_cross_entropy.fused import VocabularySplit
from kimi_jax.kernels.types import LinearAdapter

DEVICES, TOKENS, WIDTH, VOCABULARY, RANK, CHUNK, SCALE = 8, 24, 8, 64, 3, 2, 2.0


def draw():
    rng = np.random.default_rng(0)
    floats = {
        "hidden": rng.normal(size=(TOKENS, WIDTH)),
        "a": rng.normal(size=(RANK, WIDTH)),
        "b": rng.normal(size=(VOCABULARY, RANK)),
        "head": rng.normal(size=(VOCABULARY, WIDTH)),
        "weights": np.resize([1.0, 0.0, 0.5], TOKENS),
    }
    targets = rng.permutation(np.resize(np.arange(VOCABULARY), TOKENS)).astype(np.int32)
    return [jnp.asarray(v, jnp.float32) for v in floats.values()] + [jnp.asarray(targets)]


def value_and_gradients(split, adapted):
    """Of hidden, a, b, head, weights, targets: the loss, and its gradients in the first three."""

    def loss(hidden, a, b, head, weights, targets):
        adapter = LinearAdapter(a, b, SCALE) if adapted else None
        return api.linear_cross_entropy(
            hidden, head, targets, weights, adapter, chunk=CHUNK, impl="fused", split=split
        )

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def on_devices(own_tokens, adapted):
    tokens, rows = P("x") if own_tokens else P(), P("x")

    def local(*operands):
        first = jax.lax.axis_index("x") * (VOCABULARY // DEVICES)
        split = VocabularySplit("x", first, own_tokens)
        loss, (d_hidden, d_a, d_b) = value_and_gradients(split, adapted)(*operands)
        if own_tokens:  # the loss is that of one device's tokens, and a's gradient their share
            loss, d_a = jax.lax.psum((loss, d_a), "x")
        return loss, (d_hidden, d_a, d_b)

    sharded = jax.shard_map(
        local,
        mesh=jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=(tokens, P(), rows, rows, tokens, tokens),
        out_specs=(P(), (tokens, P(), rows)),
        check_vma=False,
    )
    return jax.jit(sharded)


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    operands = draw()
    for adapted in (False, True):
        wanted, gradients = jax.jit(value_and_gradients(None, adapted))(*operands)
        for own_tokens in (False, True):
            loss, found = on_devices(own_tokens, adapted)(*operands)
            case = f"adapted {adapted}, own tokens {own_tokens}"
            np.testing.assert_allclose(loss, wanted, rtol=1e-6, err_msg=case)
            for name, value, whole in zip(("hidden", "a", "b"), found, gradients, strict=True):
                np.testing.assert_allclose(
                    value, whole, rtol=1e-5, atol=1e-5, err_msg=f"{case}: {name}"
                )


if __name__ == "__main__":
    main()
