"""Timing, ceilings and the table that the kernels' benchmarks share."""

import subprocess
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROUNDS, ROUND_S = 3, 0.06
FEWEST, MOST = 5, 100  # calls a round
THREADS = 8  # that compile
MATMUL = 8192  # rows, columns and contraction of the ceiling's product
COPIED = 2**31  # bytes


class Ceilings(NamedTuple):
    """Measured on this GPU in this run: operations/s of a bf16 matmul, bytes/s of a copy (read + written)."""

    matmul: float
    copy: float


class Measured(NamedTuple):
    """A compiled function's result, seconds a call, and the temporaries its compiler reports, in bytes."""

    result: Any
    time_s: float
    temporaries: int


def seconds(call: Callable[[], Any], block: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Median over rounds of the time of one of many calls in a row; `block` waits for a result."""
    block(call())
    start = time.perf_counter()
    block(call())
    calls = max(FEWEST, min(MOST, int(ROUND_S / (time.perf_counter() - start))))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        block(result)
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[ROUNDS // 2]


def measure(function: Callable[..., Any], *operands: Any) -> Measured:
    """Compiles and times a function of arrays."""
    return _timed(jax.jit(function).lower(*operands).compile(), operands)


def _timed(compiled: Any, operands: tuple[Any, ...]) -> Measured:
    time_s = seconds(lambda: compiled(*operands))
    memory = compiled.memory_analysis()
    assert memory is not None
    return Measured(compiled(*operands), time_s, memory.temp_size_in_bytes)


class Programs:
    """Functions compiled side by side, for many that take long; all before anything is timed."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS)
        self.compiling: dict[Hashable, Future[Any]] = {}

    def add(self, key: Hashable, function: Callable[..., Any], *operands: Any) -> None:
        """Starts compiling a function for arrays, or their shapes and dtypes."""
        if key not in self.compiling:
            lowered = jax.jit(function).lower(*operands)
            self.compiling[key] = self.pool.submit(lowered.compile)

    def wait(self) -> None:
        """Until all are compiled."""
        wait(self.compiling.values())

    def measure(self, key: Hashable, *operands: Any) -> Measured:
        """Times one of them."""
        return _timed(self.compiling[key].result(), operands)


def relative_error(found: Any, wanted: Any) -> float:
    """‖found - wanted‖ / ‖wanted‖ in fp32."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return float(jnp.linalg.norm((found - wanted).ravel()) / jnp.linalg.norm(wanted.ravel()))


def pytorch() -> Any:
    """The module, or None where it is not installed: then there are no ratios to it."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return torch


def print_machine() -> None:
    """What this runs on."""
    device = jax.devices()[0]
    driver = "unknown"
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    torch = pytorch()
    installed = f"torch {torch.__version__}" if torch else "no PyTorch: no ratios to it"
    print(
        f"{device.device_kind}, driver {driver}, {device.client.platform_version.split(chr(10))[-1]}"
    )
    print(f"jax {jax.__version__}, {installed}")


def measure_ceilings() -> Ceilings:
    """The rates that figures are to be read against, by the same clock; prints them.

    The copy's is the better of XLA's and PyTorch's, so that a slow one flatters nothing.
    """
    big = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), jnp.bfloat16)
    matmul = 2 * MATMUL**3 / measure(lambda a: a @ a, big).time_s
    wide = jnp.ones((COPIED // 2,), jnp.bfloat16)
    copies = {"jax": 2 * COPIED / measure(jnp.copy, wide).time_s}
    if torch := pytorch():
        source = torch.ones(COPIED // 2, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        time_s = seconds(lambda: target.copy_(source), lambda _: torch.cuda.synchronize())
        copies["torch"] = 2 * COPIED / time_s
        del source, target
        torch.cuda.empty_cache()
    figures = ", ".join(f"{name} {rate / 1e12:.2f} TB/s" for name, rate in copies.items())
    print(f"bf16 {MATMUL}³ matmul in jax: {matmul / 1e12:.0f} TFLOP/s; copy: {figures}")
    return Ceilings(matmul, max(copies.values()))


class Table:
    """Rows printed as they are measured."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self.of_torch: dict[tuple[str, str], float] = {}
        print(
            f"{'kernel':<22}{'implementation':<18}{'case':<28}{'ms':>8}{'TFLOP/s':>9}{'of matmul':>10}"
            f"{'GB/s':>7}{'of copy':>8}{'of torch':>9}{'error':>9}{'temporaries':>13}  note"
        )

    def add(
        self,
        kernel: str,
        implementation: str,
        case: str,
        time_s: float,
        operations: float = 0,
        moved: float = 0,
        error: float | None = None,
        temporaries: int | None = None,
        note: str = "",
    ) -> None:
        """One measurement.

        Args:
            kernel: what is computed.
            implementation: by what. The first whose name begins with `torch` is what all of the same
                kernel and case are compared with.
            case: shapes.
            time_s: of one call.
            operations: of the arithmetic, if a rate is to be shown.
            moved: bytes that have to be read and written, if a rate is to be shown.
            error: relative, against fp32.
            temporaries: bytes beyond arguments and results.
            note: anything else.
        """
        if implementation.startswith("torch"):
            self.of_torch.setdefault((kernel, case), time_s)
        base = self.of_torch.get((kernel, case))
        cells = [
            (f"{operations / time_s / 1e12:.0f}" if operations else "-", 9),
            (f"{operations / time_s / self.ceilings.matmul:.0%}" if operations else "-", 10),
            (f"{moved / time_s / 1e9:.0f}" if moved else "-", 7),
            (f"{moved / time_s / self.ceilings.copy:.0%}" if moved else "-", 8),
            (f"{base / time_s:.2f}x" if base else "-", 9),
            ("-" if error is None else f"{error:.5f}", 9),
            ("-" if temporaries is None else f"{temporaries / 2**20:.1f} MiB", 13),
        ]
        print(
            f"{kernel:<22}{implementation:<18}{case:<28}{time_s * 1e3:>8.3f}"
            + "".join(f"{text:>{width}}" for text, width in cells)
            + f"  {note}",
            flush=True,
        )
