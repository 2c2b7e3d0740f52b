"""Tokens to the rows of their experts and back: 8,192 tokens, top 8 of 384 experts, 7168 wide, bf16.

Bytes are what has to be moved: each token and each row once.
"""

from argparse import Namespace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.kernels import token_movement as movement
from tools.kernel_benches.harness import Table, measure, pytorch, seconds

TOKENS, K, WIDTH, EXPERTS = 8192, 8, 7168, 384
RANKS = 8
PASSES = (
    3  # and twice as many, in one program: without what a loop begins with, which is a copy here
)
BYTES = 2.0 * (TOKENS * K + TOKENS) * WIDTH  # one direction
CASE = f"{TOKENS * K} assignments"


def rows(table: Table, _: Namespace) -> None:
    """Each part, all together, and one of eight devices' window of eight times as many tokens."""
    tokens, chosen = draw(TOKENS)
    bench_torch(table)
    order = measure(lambda c: movement.sort_by_expert(c, EXPERTS), chosen)
    table.add("sort", "jax", CASE, order.time_s, temporaries=order.temporaries)
    for impl in ("gather", "pallas"):

        def send(x: Any, order: Any, impl: Any = impl) -> Any:
            return movement.dispatch(x, order, K, impl)

        def everything(x: Any, chosen: Any, send: Any = send) -> Any:
            order = movement.sort_by_expert(chosen, EXPERTS)
            return movement.combine(jax.lax.optimization_barrier(send(x, order)), order, K)

        sent = measure(send, tokens, order.result)
        table.add("dispatch", impl, CASE, sent.time_s, 0, BYTES, None, sent.temporaries)
        together = measure(everything, tokens, chosen)
        table.add("sort and move", impl, CASE, together.time_s, 0, 2 * BYTES)
    back = measure(lambda y, o: movement.combine(y, o, K), sent.result, order.result)
    table.add("combine", "gather", CASE, back.time_s, 0, BYTES, None, back.temporaries)
    bench_window(table)


def draw(tokens: int) -> tuple[Any, Any]:
    """Random tokens, and eight different experts of each."""
    x = jax.random.normal(jax.random.key(0), (tokens, WIDTH), jnp.bfloat16)
    scores = jax.random.uniform(jax.random.key(1), (tokens, EXPERTS))
    return x, jax.lax.top_k(scores, K)[1].astype(jnp.int32)


def bench_window(table: Table) -> None:
    """A device's own experts' rows of all devices' tokens."""
    tokens, chosen = draw(TOKENS * RANKS)
    local, capacity = EXPERTS // RANKS, TOKENS * K
    case = f"{capacity} of {TOKENS * K * RANKS}"
    order = measure(lambda c: movement.sort_by_expert(c, local, 0), chosen)
    table.add("sort", "jax", case, order.time_s, temporaries=order.temporaries)
    held = 2.0 * (capacity + TOKENS * RANKS) * WIDTH
    for impl in ("gather", "pallas"):

        def send(x: Any, order: Any, impl: Any = impl) -> Any:
            return movement.dispatch_window(x, order, K, 0, capacity, impl)

        def fetch(y: Any, order: Any, impl: Any = impl) -> Any:
            return movement.combine_window(y, order, K, 0, impl)

        sent = measure(send, tokens, order.result)
        table.add("dispatch", impl, case, sent.time_s, 0, held, None, sent.temporaries)
        back = measure(fetch, sent.result, order.result)
        table.add("combine", impl, case, back.time_s, 0, held, None, back.temporaries)
        bench_further_pass(table, tokens, order.result, impl)


def bench_further_pass(table: Table, tokens: Any, order: Any, impl: Any) -> None:
    """A window of an eighth, added to what earlier passes made: in place, and as a sum of two arrays."""
    capacity = TOKENS * K // RANKS
    rows = jax.random.normal(jax.random.key(2), (capacity, WIDTH), jnp.bfloat16)
    case = f"{capacity} of {TOKENS * K * RANKS}"
    touched = 3 * 2.0 * capacity * WIDTH  # as if every row had a token of its own

    def in_place(onto: Any, y: Any, order: Any, start: Any) -> Any:
        return movement.add_window(onto, y, order, K, start, impl)

    def apart(onto: Any, y: Any, order: Any, start: Any) -> Any:
        return onto + movement.combine_window(y, order, K, start, impl)

    for name, function in (("add a window", in_place), ("combine, add", apart)):

        def passes(count: int, onto: Any, y: Any, order: Any, function: Any = function) -> Any:
            def more(number: Any, onto: Any) -> Any:
                return function(onto, y, order, (number + 1) * capacity)

            return jax.lax.fori_loop(0, count, more, onto)

        few, many = (
            measure(partial(passes, count), tokens, rows, order) for count in (PASSES, 2 * PASSES)
        )
        time_s = (many.time_s - few.time_s) / PASSES
        table.add(name, impl, case, time_s, 0, touched, None, many.temporaries)


def bench_torch(table: Table) -> None:
    """`sort`, `index_select` and `index_add_`, whose sums are bf16 and in no fixed order."""
    if torch := pytorch():
        time_torch(table, torch)
        torch.cuda.empty_cache()


def time_torch(table: Table, torch: Any) -> None:
    """What `bench_torch` says; its arrays end with it."""

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    tokens = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    chosen = torch.rand(TOKENS, EXPERTS, device="cuda").topk(K).indices.reshape(-1)
    order = chosen.sort(stable=True).indices
    source = order // K
    sent = tokens[source]
    out = torch.zeros_like(tokens)
    table.add("sort", "torch", CASE, seconds(lambda: chosen.sort(stable=True), wait))
    time_s = seconds(lambda: tokens.index_select(0, source), wait)
    table.add("dispatch", "torch", CASE, time_s, 0, BYTES)
    time_s = seconds(lambda: out.index_add_(0, source, sent), wait)
    table.add("combine", "torch", CASE, time_s, 0, BYTES)

    def everything() -> Any:
        source = chosen.sort(stable=True).indices // K
        rows = tokens.index_select(0, source)
        return torch.zeros_like(tokens).index_add_(0, source, rows)

    table.add("sort and move", "torch", CASE, seconds(everything, wait), 0, 2 * BYTES)
