"""Head and cross-entropy of K2: 16,384 tokens, 7168 wide, a vocabulary of 163,840, a frozen head.

Operations are those of the two products that loss and gradient need.
"""

from argparse import Namespace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.kernels.linear_cross_entropy import fused, reference
from kimi_jax.kernels.types import LinearAdapter
from tools.kernel_benches.harness import Table, measure, pytorch, relative_error, seconds

TOKENS, WIDTH, VOCABULARY, RANK = 16384, 7168, 163840, 16
CHUNKS = (512, 1024, 2048)
CHECKED = 1024  # tokens compared with fp32
OPERATIONS = 4.0 * TOKENS * WIDTH * VOCABULARY


def rows(table: Table, _: Namespace) -> None:
    """The products alone, then loss and gradient by every implementation."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH), jnp.bfloat16)
    head = jax.random.normal(keys[1], (VOCABULARY, WIDTH), jnp.bfloat16) * WIDTH**-0.5
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCABULARY, jnp.int32)
    weights = jnp.ones(TOKENS, jnp.float32)
    case = f"{TOKENS} tokens"
    bench_torch(table, case)
    alone = products(hidden, head)
    table.add("loss + gradient", "products alone", case, alone, OPERATIONS)

    def loss(module: Any, chunk: int, hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
        def of_hidden(hidden: Any) -> Any:
            found = module.linear_cross_entropy(hidden, head, targets, weights, None, chunk)
            return found / TOKENS

        return jax.value_and_grad(of_hidden)(hidden)

    short = [value[:CHECKED] for value in (hidden, targets, weights)]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(loss, reference, 256))(
            short[0].astype(jnp.float32), head.astype(jnp.float32), *short[1:]
        )[1]
    for name, module, chunk in [("fused", fused, c) for c in CHUNKS] + [
        ("reference", reference, 1024)
    ]:
        measured = measure(
            partial(loss, module, chunk), hidden, head, targets, weights,
        )  # fmt: skip
        error = relative_error(measured.result[1][:CHECKED], exact)
        note = f"chunk {chunk}, {measured.time_s / alone:.2f} x the products"
        table.add(
            "loss + gradient", name, case, measured.time_s, OPERATIONS, 0, error,
            measured.temporaries, note,
        )  # fmt: skip
    bench_adapter(table, case, hidden, head, targets, weights)


def bench_adapter(table: Table, case: str, *operands: Any) -> None:
    """The same with an adapted head, and the gradients of its factors."""
    a = jax.random.normal(jax.random.key(1), (RANK, WIDTH)) * WIDTH**-0.5
    b = jax.random.normal(jax.random.key(2), (VOCABULARY, RANK)) * 0.01

    def loss(hidden: Any, head: Any, targets: Any, weights: Any, a: Any, b: Any) -> Any:
        def function(hidden: Any, a: Any, b: Any) -> Any:
            adapter = LinearAdapter(a, b, 2.0)
            return fused.linear_cross_entropy(hidden, head, targets, weights, adapter, 1024)

        return jax.value_and_grad(function, argnums=(0, 1, 2))(hidden, a, b)

    measured = measure(loss, *operands, a, b)
    table.add(
        "loss + gradient", f"fused, rank {RANK}", case, measured.time_s, OPERATIONS, 0, None,
        measured.temporaries, "chunk 1024",
    )  # fmt: skip


def products(hidden: Any, head: Any) -> float:
    """Seconds of logits and of their way back, for all tokens, chunk by chunk."""
    chunk = 1024
    logits = measure(lambda h, w: h @ w.T, hidden[:chunk], head)
    back = measure(lambda d, w: d @ w, logits.result, head)
    return (logits.time_s + back.time_s) * (TOKENS / chunk)


def bench_torch(table: Table, case: str) -> None:
    """Chunks of `cross_entropy` by autograd, the head frozen."""
    if torch := pytorch():
        time_torch(table, torch, case)
        torch.cuda.empty_cache()


def time_torch(table: Table, torch: Any, case: str) -> None:
    """What `bench_torch` says; its arrays end with it."""
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    hidden, head = random(TOKENS, WIDTH), random(VOCABULARY, WIDTH) * WIDTH**-0.5
    targets = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")
    hidden.requires_grad_()

    def call() -> Any:
        hidden.grad = None
        for h, t in zip(hidden.split(1024), targets.split(1024), strict=True):
            logits = functional.linear(h, head).float()
            functional.cross_entropy(logits, t, reduction="sum").backward()

    time_s = seconds(call, lambda _: torch.cuda.synchronize())
    table.add("loss + gradient", "torch", case, time_s, OPERATIONS, note="chunk 1024")
