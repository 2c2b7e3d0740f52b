"""Whether the device that is compiled for has what the Mosaic GPU kernels are written for."""

from kimi_jax.kernels.grouped_matmul.choice import HOPPER
from kimi_jax.kernels.target import device_kind


def on_hopper() -> bool:
    """By the name of the device at hand, or of the one that is compiled for (see `target`)."""
    return bool(HOPPER & set(device_kind().replace("-", " ").split()))
