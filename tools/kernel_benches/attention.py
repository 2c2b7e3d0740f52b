"""Attention of K2's shapes: 64 heads, queries and keys 128 + 64 wide, values 128.

Operations are those of the causal triangle: forward 2 · (192 + 128) a pair that is seen, forward and
backward together 3.5 times as many. Errors are those of one head, against fp32. Operands are as the
model has them: what it takes `cudnn` to copy keys and values together is in its times, not in torch's.
"""

from argparse import Namespace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.kernels.mla_attention import cudnn, mosaic, reference
from tools.kernel_benches.harness import Table, measure, pytorch, relative_error, seconds

HEADS, NOPE, ROPE, VALUE = 64, 128, 64, 128
KEY, SCALE = NOPE + ROPE, (NOPE + ROPE) ** -0.5
DOCUMENTS = {
    "16 x 512": [512] * 16,
    "1 to 3072, mixed": [3072, 40, 1500, 1, 700, 255, 900, 64, 1024, 300, 200, 136],
}
SEPARATE, TOGETHER = 4, 4  # batches of so many rows of 512


def rows(table: Table, _: Namespace) -> None:
    """One segment a row by every implementation, then packed rows."""
    for batch, length in ((1, 8192), (4, 2048)):
        case = f"{batch} x {length}"
        segments = np.ones((batch, length), np.int32)
        bench_torch(table, case, batch, length)
        for name, module in (("cudnn", cudnn), ("pallas", mosaic)):
            bench(table, case, name, module.attention, segments)
    deterministic = partial(cudnn.attention, deterministic=True)
    bench(table, "1 x 8192", "cudnn, same bits", deterministic, np.ones((1, 8192), np.int32))
    bench_separate(table)
    for case, lengths in DOCUMENTS.items():
        segments = np.repeat(np.arange(len(lengths)) + 1, lengths)[None].astype(np.int32)
        bench(table, case, "pallas", mosaic.attention, segments)


def operands(*shape: int) -> list[Any]:
    """Random queries, keys beside values, shared keys, and gradients of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    ends = ((HEADS, KEY), (HEADS, NOPE + VALUE), (ROPE,), (HEADS, VALUE))
    return [
        jax.random.normal(key, (*shape, *end), jnp.bfloat16)
        for key, end in zip(keys, ends, strict=True)
    ]


def operations(segments: np.ndarray) -> float:
    """Of the forward pass: half of each segment's square, as is the custom."""
    lengths = [np.unique_counts(row).counts.astype(float) for row in segments]
    return sum((length**2).sum() for length in lengths) * HEADS * (KEY + VALUE)


def with_gradients(function: Any, *operands: Any) -> Any:
    """The output, and the gradients of queries, of keys and values, and of the shared keys."""
    *inputs, d_out, segments = operands
    out, pullback = jax.vjp(lambda *inputs: function(*inputs, segments, SCALE), *inputs)
    return out, *pullback(d_out)


def bench(table: Table, case: str, name: str, function: Any, segments: np.ndarray) -> None:
    """Forward, then forward and backward."""
    q, kv, rope_key, d_out = operands(*segments.shape)
    ids, count = jnp.asarray(segments), operations(segments)
    forward = measure(lambda *inputs: function(*inputs, SCALE), q, kv, rope_key, ids)
    both = measure(partial(with_gradients, function), q, kv, rope_key, d_out, ids)
    one = [value[:, :, :1].astype(jnp.float32) for value in (q, kv, d_out)]
    one.insert(2, rope_key.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(partial(with_gradients, reference.attention))(*one, ids)
    # The shared keys' gradient is that of all heads: tests/device looks at it.
    errors = [
        relative_error(found[:, :, :1], want)
        for found, want in zip(both.result[:3], wanted[:3], strict=True)
    ]
    table.add("attention", name, case, forward.time_s, count, 0, errors[0], forward.temporaries)
    note = "errors of dq, dkv " + ", ".join(f"{e:.4f}" for e in errors[1:])
    table.add(
        "with gradients",
        name,
        case,
        both.time_s,
        3.5 * count,
        0,
        max(errors),
        both.temporaries,
        note,
    )


def bench_separate(table: Table) -> None:
    """What packed rows are to be compared with: the same documents, a few rows at a time."""
    shape = (SEPARATE, TOGETHER, 512)
    *inputs, d_out = operands(*shape)
    ids = jnp.ones(shape, jnp.int32)

    def forward(*values: Any) -> Any:
        batches = [[value[n] for value in values] for n in range(SEPARATE)]
        return [cudnn.attention(q, kv, rope_key, ids, SCALE) for q, kv, rope_key, ids in batches]

    def both(*values: Any) -> Any:
        batches = [[value[n] for value in values] for n in range(SEPARATE)]
        return [with_gradients(cudnn.attention, *batch) for batch in batches]

    count = operations(np.ones((SEPARATE * TOGETHER, 512), np.int32))
    for kernel, measured, times in (
        ("attention", measure(forward, *inputs, ids), 1),
        ("with gradients", measure(both, *inputs, d_out, ids), 3.5),
    ):
        note = "four calls, each of 4 rows of 512"
        table.add(
            kernel, "cudnn", "4 of 4 x 512", measured.time_s, times * count, 0, None, None, note
        )


def bench_torch(table: Table, case: str, batch: int, length: int) -> None:
    """`scaled_dot_product_attention` by cuDNN and by FlashAttention, which wants the values padded."""
    if torch := pytorch():
        time_torch(table, torch, case, batch, length)
        torch.cuda.empty_cache()


def time_torch(table: Table, torch: Any, case: str, batch: int, length: int) -> None:
    """What `bench_torch` says; its arrays end with it."""
    from torch.nn import attention, functional  # pyright: ignore[reportMissingImports]

    count = operations(np.ones((batch, length), np.int32))
    for name, backend, value in (
        ("torch cudnn", attention.SDPBackend.CUDNN_ATTENTION, VALUE),
        ("torch flash, 192", attention.SDPBackend.FLASH_ATTENTION, KEY),
    ):
        q, k, v, d_out = (
            torch.randn(batch, HEADS, length, width, device="cuda", dtype=torch.bfloat16)
            for width in (KEY, KEY, value, value)
        )
        for operand in (q, k, v):
            operand.requires_grad_()

        def forward(q: Any = q, k: Any = k, v: Any = v, backend: Any = backend) -> Any:
            with attention.sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        def both(forward: Any = forward, d_out: Any = d_out, inputs: Any = (q, k, v)) -> Any:
            return torch.autograd.grad(forward(), inputs, d_out)

        def wait(_: Any) -> None:
            torch.cuda.synchronize()

        try:
            table.add("attention", name, case, seconds(forward, wait), count)
            table.add("with gradients", name, case, seconds(both, wait), 3.5 * count)
        except RuntimeError as error:  # not every release takes values narrower than keys
            print(f"{name}, {case}: {str(error).splitlines()[0]}")
