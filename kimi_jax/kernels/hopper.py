"""Whether the device that is compiled for has what the Mosaic GPU kernels are written for."""

from kimi_jax.kernels.target import device_kind

HOPPER = frozenset({"H100", "H200", "GH200", "H800", "H20"})
_OPTIONS = {
    # This rewrite lets an operation write its result into a stack of layers' results. Where the result
    # has another use as well, it is computed twice, and XLA merges no calls of Pallas kernels.
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # A scan's stack of results begins as zeros, all of which it writes over: what is kept of 60 layers
    # is 45 GB. With this, XLA looks whether the loop covers the stack, and leaves out the zeros.
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
}


def compiler_options() -> dict[str, bool] | None:
    """What XLA is told for programs that call these kernels in a scan over layers."""
    return dict(_OPTIONS) if on_hopper() else None


def on_hopper() -> bool:
    """By the name of the device at hand, or of the one that is compiled for (see `target`)."""
    return bool(HOPPER & set(device_kind().replace("-", " ").split()))
