"""The grouped matmul by packed int4: products, few rows, adapters, what stands between an expert's.

`both` is the forward and the backward pass together, and its note what an adapter adds to the two
products alone. `pair` is both for gate and up with adapters, by one call and by two. `gate` is half of
`gate_up`, to compare two products with one; `elementwise` notes its share of an expert layer, whose six
products are the sum of those measured here.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.int4 import dequantise
from kimi_jax.kernels import api
from kimi_jax.kernels.types import GroupedAdapter, PackedWeight
from tools.kernel_benches.harness import Programs, Table, pytorch, seconds

GROUPS = 48  # experts of one of eight ranks
SHAPES = {"gate_up": (7168, 4096), "down": (2048, 7168), "gate": (7168, 2048)}  # in, out
RANKS = (8, 32)
FEW_ROWS = (1, 4, 16)  # a group
SCRATCH_ROWS = (16,)  # a group, besides options.rows: where `choice` is to know what is faster
CHUNK = 1024
FORWARD, INPUT_GRADIENT = "forward", "input gradient"
Case = tuple[str, int, str]  # shape, rows, kind of group sizes


def rows(table: Table, options: argparse.Namespace) -> None:
    """Adds this kernel's rows: options.parts says which, options.rows, .groups and .shapes the cases."""
    bench = _Bench(table, options)
    for part in options.parts:
        getattr(bench, part)()


class _Bench:
    """One method for each part; what several need is compiled and measured once."""

    def __init__(self, table: Table, options: argparse.Namespace) -> None:
        self.table, self.options = table, options
        self.programs = Programs()
        self.least, self.kind = min(options.rows), options.groups[0]
        self.times: dict[tuple[Case, str, str], float] = {}  # by implementation and kernel

    def add(self, cases: list[Case], impl: str = "pallas") -> None:
        """Compiles products, and measures those that have not been yet."""
        for shape, count, _ in cases:
            add_products(self.programs, impl, shape, count)
        self.programs.wait()
        for case in cases:
            if (case, impl, FORWARD) in self.times:
                continue
            if impl == "pallas" and case[1] in self.options.rows:
                bench_torch(self.table, case)
            found = bench_products(self.table, self.programs, case, impl)
            self.times |= {(case, impl, kernel): time_s for kernel, time_s in found.items()}

    def both(self, shape: str) -> float:
        """Seconds of a shape's two products at the least number of rows."""
        case = (shape, self.least, self.kind)
        self.add([case])
        return sum(self.times[case, "pallas", kernel] for kernel in (FORWARD, INPUT_GRADIENT))

    def few(self) -> None:
        """1 to 16 rows a group."""
        counts = [count * GROUPS for count in FEW_ROWS]
        self.add([(shape, count, "even") for shape in self.options.shapes for count in counts])

    def products(self) -> None:
        """Many rows, beside PyTorch's."""
        options = self.options
        for shape in options.shapes:
            for count in options.rows:
                self.add([(shape, count, kind) for kind in options.groups])

    def scratch(self) -> None:
        """The other route, where `choice` is to know which is faster."""
        counts = [*(count * GROUPS for count in SCRATCH_ROWS), *self.options.rows]
        cases = [(self.options.shapes[0], count, self.kind) for count in counts]
        self.add(cases)
        self.add(cases, "scratch")

    def adapters(self) -> None:
        """Both directions with adapters, compared with the products alone."""
        for shape in self.options.shapes:
            add_adapters(self.programs, shape, self.least)
        self.programs.wait()
        for shape in self.options.shapes:
            case = (shape, self.least, self.kind)
            bench_adapters(self.table, self.programs, case, self.both(shape))

    def pair(self) -> None:
        """Gate and up with adapters, in both directions, by one call and by two."""
        for count in self.options.rows:
            add_pair(self.programs, count)
        self.programs.wait()
        for count in self.options.rows:
            for kind in self.options.groups:
                bench_pair(self.table, self.programs, ("gate", count, kind))

    def elementwise(self) -> None:
        """The pass between an expert's projections, and gate and up as two products."""
        add_elementwise(self.programs, self.least)
        expert = 2 * self.both("gate") + self.both("down")
        bench_elementwise(self.table, self.programs, self.least, expert)


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


@partial(jax.jit, static_argnums=0)
def _one_group(transposed: bool, x: Any, weight: PackedWeight, group: Any, start: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        plain = dequantise(weight.values[group], weight.scale[group]).astype(jnp.float32)
        some = jax.lax.dynamic_slice_in_dim(x, start, CHUNK).astype(jnp.float32)
        return some @ (plain if transposed else plain.T)


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
    squares = []
    start = 0
    for group, size in enumerate(sizes):
        for offset in range(0, int(size), CHUNK):
            wanted = _one_group(transposed, x, weight, group, start + offset)
            squares.append(_squares(found, wanted, start + offset, min(CHUNK, int(size) - offset)))
        start += int(size)
    wrong, total = np.sum(jax.device_get(squares), axis=0)
    return float(wrong / total) ** 0.5


@partial(jax.jit, static_argnums=(0, 1))
def random_weight(width_in: int, out: int) -> PackedWeight:
    """Codes over the whole range and scales around a hundredth."""
    codes, scales = jax.random.split(jax.random.key(0))
    values = jax.random.randint(codes, (GROUPS, out, width_in), -8, 8, jnp.int8)
    scale = jax.random.uniform(scales, (GROUPS, width_in // 32, out), minval=0.005, maxval=0.015)
    return PackedWeight(values.astype(jnp.int4), scale.astype(jnp.bfloat16))


def random_rows(count: int, width: int) -> Any:
    """Random bf16 rows."""
    return jax.random.normal(jax.random.key(count + width), (count, width), jnp.bfloat16)


def named(case: Case) -> str:
    """For the table."""
    shape, count, kind = case
    return f"{shape} {count} {kind}"


def operations(case: Case) -> float:
    """Of one product."""
    width_in, out = SHAPES[case[0]]
    return 2.0 * case[1] * width_in * out


def packed_bytes(case: Case) -> float:
    """Of the weights with their scales."""
    width_in, out = SHAPES[case[0]]
    return GROUPS * out * width_in * (0.5 + 2 / 32)


def rates(case: Case, products: int = 1) -> dict[str, Any]:
    """What a product is to be judged by: bytes where rows are few, operations where they are many."""
    if case[1] <= max(FEW_ROWS) * GROUPS:
        return {"moved": products * packed_bytes(case)}
    return {"operations": products * operations(case)}


def bench_torch(table: Table, case: Case) -> None:
    """`torch._grouped_mm` in bf16, forward and on the weight's other order."""
    torch = pytorch()
    if not torch:
        return
    shape, count, kind = case
    width_in, out = SHAPES[shape]
    ends = torch.tensor(np.cumsum(group_sizes(count, kind)), dtype=torch.int32, device="cuda")
    weight = torch.randn(GROUPS, out, width_in, device="cuda", dtype=torch.bfloat16)
    for kernel, width, operand in (
        (FORWARD, width_in, weight.transpose(1, 2)),
        (INPUT_GRADIENT, out, weight),
    ):
        x = torch.randn(count, width, device="cuda", dtype=torch.bfloat16)
        call = partial(torch._grouped_mm, x, operand, offs=ends)
        time_s = seconds(call, lambda _: torch.cuda.synchronize())
        table.add(kernel, "torch bf16", named(case), time_s, **rates(case))
    del weight, x, operand, call
    torch.cuda.empty_cache()


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype)


def weight_shape(shape: str) -> PackedWeight:
    """A packed weight to compile for."""
    width_in, out = SHAPES[shape]
    values = shaped(GROUPS, out, width_in, dtype=jnp.int4)
    return PackedWeight(values, shaped(GROUPS, width_in // 32, out))  # pyright: ignore[reportArgumentType]


SIZES_SHAPE = jax.ShapeDtypeStruct((GROUPS,), jnp.int32)


def add_products(programs: Programs, impl: Any, shape: str, count: int) -> None:
    """Forward and input gradient without adapter."""
    width_in, out = SHAPES[shape]

    def forward(x: Any, weight: Any, sizes: Any) -> Any:
        return api.grouped_matmul(x, weight, sizes, impl=impl)

    def gradient(dy: Any, weight: Any, sizes: Any) -> Any:
        zeros = jnp.zeros((count, width_in), jnp.bfloat16)
        return jax.vjp(lambda x: forward(x, weight, sizes), zeros)[1](dy)[0]

    for kernel, function, width in (
        (FORWARD, forward, width_in),
        (INPUT_GRADIENT, gradient, out),
    ):
        key = (kernel, impl, shape, count)
        programs.add(key, function, shaped(count, width), weight_shape(shape), SIZES_SHAPE)


def bench_products(table: Table, programs: Programs, case: Case, impl: str) -> dict[str, float]:
    """What `add_products` added, for one kind of group sizes; the seconds of each."""
    shape, count, kind = case
    width_in, out = SHAPES[shape]
    weight, numbers = random_weight(width_in, out), group_sizes(count, kind)
    times = {}
    for kernel, width in ((FORWARD, width_in), (INPUT_GRADIENT, out)):
        operand = random_rows(count, width)
        key = (kernel, impl, shape, count)
        found = programs.measure(key, operand, weight, jnp.asarray(numbers))
        error = error_of(found.result, operand, weight, numbers, kernel == INPUT_GRADIENT)
        times[kernel] = found.time_s
        table.add(
            kernel,
            impl,
            named(case),
            found.time_s,
            error=error,
            temporaries=found.temporaries,
            **rates(case),
        )
    return times


def factor_shapes(shape: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of an adapter's a and b."""
    width_in, out = SHAPES[shape]
    return (GROUPS, rank, width_in), (GROUPS, out, rank)


def add_adapters(programs: Programs, shape: str, count: int) -> None:
    """Forward and backward together with adapters."""

    def both(x: Any, dy: Any, weight: Any, sizes: Any, a: Any, b: Any) -> Any:
        def product(x: Any, a: Any, b: Any) -> Any:
            adapter = GroupedAdapter(a, b, 2.0)
            return api.grouped_matmul(x, weight, sizes, adapter, impl="pallas")

        y, pullback = jax.vjp(product, x, a, b)
        return y, pullback(dy)

    width_in, out = SHAPES[shape]
    operands = (shaped(count, width_in), shaped(count, out), weight_shape(shape), SIZES_SHAPE)
    for rank in RANKS:
        factors = (shaped(*each, dtype=jnp.float32) for each in factor_shapes(shape, rank))
        programs.add(("both", rank, shape, count), both, *operands, *factors)


def bench_adapters(table: Table, programs: Programs, case: Case, plain_s: float) -> None:
    """What `add_adapters` added, compared with the two products alone."""
    shape, count, kind = case
    width_in, out = SHAPES[shape]
    weight, sizes = random_weight(width_in, out), jnp.asarray(group_sizes(count, kind))
    operands = (random_rows(count, width_in), random_rows(count, out), weight, sizes)
    for rank in RANKS:
        a_shape, b_shape = factor_shapes(shape, rank)
        a = jax.random.normal(jax.random.key(0), a_shape) / width_in**0.5
        b = jax.random.normal(jax.random.key(1), b_shape)
        found = programs.measure(("both", rank, shape, count), *operands, a, b)
        table.add(
            f"both, rank {rank}",
            "pallas",
            named(case),
            found.time_s,
            temporaries=found.temporaries,
            note=f"+{100 * (found.time_s / plain_s - 1):.1f} %",
            **rates(case, products=2),
        )


def in_one_call(x: Any, weights: Any, sizes: Any, adapters: Any) -> Any:
    """Gate and up as the model has them."""
    return api.grouped_matmul_pair(x, weights, sizes, adapters, impl="pallas")


def in_two_calls(x: Any, weights: Any, sizes: Any, adapters: Any) -> Any:
    """The same, with nothing shared."""
    each = zip(weights, adapters, strict=True)
    return tuple(api.grouped_matmul(x, w, sizes, a, impl="pallas") for w, a in each)


def both_passes(products: Any, x: Any, dys: Any, weights: Any, sizes: Any, factors: Any) -> Any:
    """The products, and the gradients of the rows and the factors."""

    def forward(x: Any, factors: Any) -> Any:
        adapters = tuple(GroupedAdapter(a, b, 2.0) for a, b in factors)
        return products(x, weights, sizes, adapters)

    ys, pullback = jax.vjp(forward, x, factors)
    return ys, pullback(dys)


CALLS = {"two calls": in_two_calls, "one call": in_one_call}


def add_pair(programs: Programs, count: int) -> None:
    """Forward and backward together of two products with adapters."""
    width_in, out = SHAPES["gate"]
    pair = tuple(shaped(*each, dtype=jnp.float32) for each in factor_shapes("gate", RANKS[0]))
    rows, dy = shaped(count, width_in), shaped(count, out)
    weights = (weight_shape("gate"),) * 2

    for name, products in CALLS.items():
        operands = rows, (dy, dy), weights, SIZES_SHAPE, (pair, pair)
        programs.add((name, count), partial(both_passes, products), *operands)


def bench_pair(table: Table, programs: Programs, case: Case) -> None:
    """What `add_pair` added, for one kind of group sizes."""
    _, count, kind = case
    width_in, out = SHAPES["gate"]
    gate, sizes = random_weight(width_in, out), jnp.asarray(group_sizes(count, kind))
    weights = gate, PackedWeight(gate.values[::-1], gate.scale[::-1])  # no weight is read for both
    dy = random_rows(count, out)
    factors = tuple(
        jax.random.normal(jax.random.key(n), shape) / width_in**0.5
        for n, shape in enumerate(factor_shapes("gate", RANKS[0]))
    )
    two_s = None
    for name in CALLS:
        operands = random_rows(count, width_in), (dy, dy), weights, sizes, (factors, factors)
        found = programs.measure((name, count), *operands)
        two_s = two_s or found.time_s
        table.add(
            f"gate and up, rank {RANKS[0]}",
            name,
            f"{count} {kind}",
            found.time_s,
            temporaries=found.temporaries,
            note=f"{100 * (found.time_s / two_s - 1):+.1f} %",
            **rates(case, products=4),
        )


def elementwise(gate: Any, up: Any, weights: Any) -> Any:
    """What stands between an expert's projections, as the model has it."""
    hidden = jax.nn.silu(gate) * up
    return (hidden.astype(jnp.float32) * weights[:, None]).astype(gate.dtype)


def add_elementwise(programs: Programs, count: int) -> None:
    """Forward and backward."""

    def backward(gate: Any, up: Any, weights: Any, dh: Any) -> Any:
        return jax.vjp(elementwise, gate, up, weights)[1](dh)

    h, weights = shaped(count, SHAPES["gate"][1]), shaped(count, dtype=jnp.float32)
    programs.add(("elementwise", count), elementwise, h, h, weights)
    programs.add(("elementwise backward", count), backward, h, h, weights, h)


def bench_elementwise(table: Table, programs: Programs, count: int, expert_s: float) -> None:
    """What `add_elementwise` added, and its share of an expert layer with products of `expert_s`."""
    hidden = SHAPES["gate"][1]
    h = random_rows(count, hidden)
    weights = jax.random.uniform(jax.random.key(3), (count,))
    for name, operands, passes in (
        ("elementwise", (h, h, weights), 3),
        ("elementwise backward", (h, h, weights, h), 5),
    ):
        found = programs.measure((name, count), *operands)
        share = f"{100 * found.time_s / expert_s:.1f} % of the products"
        moved = passes * 2 * count * hidden
        table.add(name, "XLA", f"{count} x {hidden}", found.time_s, moved=moved, note=share)
