"""Times the grouped matmul's implementations on this machine's GPU, in one table.

    python tools/bench_kernels.py [--rows 16384 65536] [--groups skewed even]

Every figure comes from the same run, the ceilings and PyTorch's too (where PyTorch is installed; its
weights are bf16). Rates count 2 · rows · in · out operations. `error` is relative to fp32 on the
dequantised weights. `temporaries` is what the compiler reports beyond arguments and results.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.int4 import dequantise
from kimi_jax.kernels.grouped_matmul import mosaic, scratch
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight

GROUPS = 48  # experts of one of eight ranks
SHAPES = {"gate_up": (7168, 4096), "down": (2048, 7168)}  # in, out
RANKS = (8, 32)
FEW_ROWS = (1, 4, 16)
CHUNK = 1024
REPEATS, ROUNDS = 20, 3


def group_sizes(rows: int, kind: str, seed: int = 0) -> np.ndarray:
    """Even, or skewed: the smallest under a quarter of the mean, the largest over twice the mean."""
    if kind == "even":
        return np.array([rows // GROUPS + (g < rows % GROUPS) for g in range(GROUPS)], np.int32)
    rng = np.random.default_rng(seed)
    share = np.exp(0.45 * rng.normal(size=GROUPS))
    sizes = np.floor(share / share.sum() * rows).astype(np.int32)
    sizes[0], sizes[1] = int(0.2 * rows / GROUPS), int(2.3 * rows / GROUPS)
    while missing := rows - int(sizes.sum()):
        g = rng.integers(2, GROUPS)
        sizes[g] += np.sign(missing) * min(abs(missing), max(1, sizes[g] // 20))
    return sizes


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median over rounds of the time of one of many calls in a row."""
    wait(call())
    wait(call())
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            result = call()
        wait(result)
        times.append((time.perf_counter() - start) / REPEATS)
    return sorted(times)[ROUNDS // 2]


@partial(jax.jit, static_argnums=0)
def _one_group(transposed: bool, x: Any, weight: PackedWeight, group: Any, start: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        plain = dequantise(weight.values[group], weight.scale[group]).astype(jnp.float32)
        rows = jax.lax.dynamic_slice_in_dim(x, start, CHUNK).astype(jnp.float32)
        return rows @ (plain if transposed else plain.T)


@jax.jit
def _squares(found: Any, wanted: Any, start: Any, count: Any) -> tuple[Any, Any]:
    found = jax.lax.dynamic_slice_in_dim(found, start, CHUNK).astype(jnp.float32)
    mine = jnp.arange(CHUNK)[:, None] < count
    return jnp.sum(mine * (found - wanted) ** 2), jnp.sum(mine * wanted**2)


def error_of(
    found: Any, x: Any, weight: PackedWeight, sizes: np.ndarray, transposed: bool
) -> float:
    """Relative error of a product against fp32, group by group."""
    x, found = (jnp.pad(v, ((0, CHUNK), (0, 0))) for v in (x, found))
    wrong = total = 0.0
    start = 0
    for group, size in enumerate(sizes):
        for offset in range(0, int(size), CHUNK):
            wanted = _one_group(transposed, x, weight, group, start + offset)
            squares = _squares(found, wanted, start + offset, min(CHUNK, int(size) - offset))
            wrong, total = wrong + float(squares[0]), total + float(squares[1])
        start += int(size)
    return (wrong / total) ** 0.5


@partial(jax.jit, static_argnums=(0, 1))
def random_weight(width_in: int, out: int) -> PackedWeight:
    """Codes over the whole range and scales around a hundredth."""
    codes, scales = jax.random.split(jax.random.key(0))
    values = jax.random.randint(codes, (GROUPS, out, width_in), -8, 8, jnp.int8)
    scale = jax.random.uniform(scales, (GROUPS, width_in // 32, out), minval=0.005, maxval=0.015)
    return PackedWeight(values.astype(jnp.int4), scale.astype(jnp.bfloat16))


class Table:
    """Rows printed as they are measured."""

    def __init__(self) -> None:
        self.torch: dict[tuple[Any, ...], float] = {}
        print(
            f"{'kernel':<16}{'implementation':<22}{'shape':<9}{'rows':>7} {'groups':<7}"
            f"{'ms':>8}{'TFLOP/s':>9}{'packed GB/s':>12}{'of torch':>9}{'error':>9}{'temporaries':>13}"
        )

    def add(
        self,
        kernel: str,
        name: str,
        case: tuple[str, int, str],
        time_s: float,
        error: float | None = None,
        temporaries: int | None = None,
        products: int = 1,
    ) -> None:
        """One measurement; PyTorch's own are what later ones of the same case are compared with."""
        shape, rows, kind = case
        width_in, out = SHAPES[shape]
        if name.startswith("torch"):
            self.torch[kernel, case] = time_s
        base = self.torch.get((kernel, case))
        packed = GROUPS * out * width_in * (0.5 + 2 / 32)
        print(
            f"{kernel:<16}{name:<22}{shape:<9}{rows:>7} {kind:<7}{time_s * 1e3:>8.3f}"
            f"{products * 2 * rows * width_in * out / time_s / 1e12:>9.0f}"
            f"{products * packed / time_s / 1e9:>12.0f}"
            + (f"{base / time_s:>8.2f}x" if base else f"{'-':>9}")
            + (f"{error:>9.5f}" if error is not None else f"{'-':>9}")
            + (f"{temporaries / 2**20:>9.1f} MiB" if temporaries is not None else f"{'-':>13}"),
            flush=True,
        )


def measure(function: Callable[..., Any], *operands: Any) -> tuple[Any, float, int]:
    """Result, seconds a call, and the bytes of temporaries that the compiler reports."""
    compiled = jax.jit(function).lower(*operands).compile()
    time_s = seconds(lambda: compiled(*operands), jax.block_until_ready)
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled(*operands), time_s, memory.temp_size_in_bytes


def bench_torch(table: Table, case: tuple[str, int, str]) -> None:
    """`torch._grouped_mm` in bf16, forward and on the weight's other order."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("PyTorch is not installed: no ratios to it")
        return
    shape, rows, kind = case
    width_in, out = SHAPES[shape]
    ends = torch.tensor(np.cumsum(group_sizes(rows, kind)), dtype=torch.int32, device="cuda")
    weight = torch.randn(GROUPS, out, width_in, device="cuda", dtype=torch.bfloat16)
    for kernel, width, operand in (
        ("forward", width_in, weight.transpose(1, 2)),
        ("input gradient", out, weight),
    ):
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        call = partial(torch._grouped_mm, x, operand, offs=ends)
        table.add(kernel, "torch bf16", case, seconds(call, lambda _: torch.cuda.synchronize()))
    del weight, x, operand, call
    torch.cuda.empty_cache()


def bench_products(table: Table, case: tuple[str, int, str], modules: dict[str, Any]) -> None:
    """Forward and input gradient without adapter."""
    shape, rows, kind = case
    width_in, out = SHAPES[shape]
    weight, numbers = random_weight(width_in, out), group_sizes(rows, kind)
    sizes = jnp.asarray(numbers)
    x, dy = rows_of(rows, width_in), rows_of(rows, out)
    for name, module in modules.items():

        def forward(x: Any, weight: Any, sizes: Any, module: Any = module) -> Any:
            return module.grouped_matmul(x, weight, sizes)

        def gradient(dy: Any, weight: Any, sizes: Any, forward: Any = forward) -> Any:
            zeros = jnp.zeros((rows, width_in), jnp.bfloat16)
            return jax.vjp(lambda x: forward(x, weight, sizes), zeros)[1](dy)[0]

        for kernel, function, operand in (
            ("forward", forward, x),
            ("input gradient", gradient, dy),
        ):
            result, time_s, temporaries = measure(function, operand, weight, sizes)
            error = error_of(result, operand, weight, numbers, function is gradient)
            table.add(kernel, name, case, time_s, error, temporaries)


def bench_adapters(table: Table, case: tuple[str, int, str]) -> None:
    """Forward and backward together, without and with adapters."""
    shape, rows, kind = case
    width_in, out = SHAPES[shape]
    weight, sizes = random_weight(width_in, out), jnp.asarray(group_sizes(rows, kind))
    x, dy = rows_of(rows, width_in), rows_of(rows, out)

    def both(x: Any, dy: Any, weight: Any, sizes: Any, a: Any = None, b: Any = None) -> Any:
        def product(x: Any, a: Any, b: Any) -> Any:
            adapter = None if a is None else GroupedAdapter(a, b, 2.0)
            return mosaic.grouped_matmul(x, weight, sizes, adapter)

        y, pullback = jax.vjp(product, x, a, b)
        return y, pullback(dy)

    _, plain, temporaries = measure(both, x, dy, weight, sizes)
    table.add("both", "pallas", case, plain, None, temporaries, products=2)
    for rank in RANKS:
        a = jax.random.normal(jax.random.key(1), (GROUPS, rank, width_in)) / width_in**0.5
        b = jax.random.normal(jax.random.key(2), (GROUPS, out, rank))
        _, time_s, temporaries = measure(both, x, dy, weight, sizes, a, b)
        name = f"rank {rank}: +{100 * (time_s / plain - 1):.1f} %"
        table.add("both", name, case, time_s, None, temporaries, products=2)


def rows_of(rows: int, width: int) -> Any:
    """Random bf16 rows."""
    return jax.random.normal(jax.random.key(rows + width), (rows, width), jnp.bfloat16)


def print_machine() -> None:
    """What this ran on, and the two ceilings that figures are to be read against."""
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    big = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    matmul = jax.jit(lambda a: a @ a)
    time_s = seconds(lambda: matmul(big), jax.block_until_ready)
    print(f"bf16 8192³ matmul in jax: {2 * 8192**3 / time_s / 1e12:.0f} TFLOP/s")
    wide = jnp.ones((2**30,), jnp.bfloat16)
    copy = jax.jit(lambda v: v + 1)
    time_s = seconds(lambda: copy(wide), jax.block_until_ready)
    print(
        f"reading and writing {wide.nbytes >> 30} GiB: {2 * wide.nbytes / time_s / 1e12:.2f} TB/s"
    )


def main() -> None:
    """Measures everything that was asked for."""
    parser = argparse.ArgumentParser(description="Times the grouped matmul on this GPU.")
    parser.add_argument("--rows", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--groups", nargs="+", choices=("skewed", "even"), default=["skewed"])
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    options = parser.parse_args()
    print_machine()
    table = Table()
    for shape in options.shapes:
        for rows in options.rows:
            for kind in options.groups:
                case = (shape, rows, kind)
                bench_torch(table, case)
                bench_products(table, case, {"pallas": mosaic})
        smallest = (shape, min(options.rows), options.groups[0])
        bench_products(table, smallest, {"scratch": scratch})
        bench_adapters(table, smallest)
        for few in FEW_ROWS:
            bench_products(table, (shape, few * GROUPS, "even"), {"pallas": mosaic})


if __name__ == "__main__":
    main()
