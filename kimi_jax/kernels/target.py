"""Which kind of device the kernels are chosen for: the one at hand, or one that is compiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_absent: ContextVar[str | None] = ContextVar("absent_device_kind", default=None)


def device_kind() -> str:
    """As `jax.Device.device_kind` names it, "NVIDIA H200"."""
    return _absent.get() or jax.devices()[0].device_kind


@contextmanager
def compiling_for(kind: str) -> Iterator[None]:
    """Functions traced inside take the kernels of `kind`, which need not be there."""
    token = _absent.set(kind)
    try:
        yield
    finally:
        _absent.reset(token)
