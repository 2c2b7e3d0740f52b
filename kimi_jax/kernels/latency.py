"""What a kernel is expected to take, for XLA's scheduler.

XLA cannot look into a kernel of ours and takes it for a short one, so that it hides no exchange between
devices behind it. An estimate within a factor of two is enough to order a program by.
"""

from collections.abc import Callable
from typing import Any

from jax.experimental.xla_metadata import set_xla_metadata

OPERATIONS, BYTES = 600e12, 3.5e12  # a second, of these kernels on an H200 (LOG.md)


def expected(
    kernel: Callable[..., Any], operations: float = 0, moved: float = 0
) -> Callable[..., Any]:
    """`kernel`, whose calls say how long they take.

    Args:
        kernel: a function of arrays that becomes one call.
        operations: of its arithmetic.
        moved: bytes that it reads and writes. With neither, XLA is told nothing.
    """
    if not operations and not moved:
        return kernel
    nanoseconds = round(1e9 * max(operations / OPERATIONS, moved / BYTES))

    def call(*operands: Any) -> Any:
        with set_xla_metadata(latency_metadata=str(nanoseconds)):
            return kernel(*operands)

    return call
