"""Whether the device that is compiled for has what the Mosaic GPU kernels are written for."""

from kimi_jax.kernels.target import device_kind

HOPPER = frozenset({"H100", "H200", "GH200", "H800", "H20"})
_OPTIONS: dict[str, bool | int] = {
    # This rewrite lets an operation write its result into a stack of layers' results. Where the result
    # has another use as well, it is computed twice, and XLA merges no calls of Pallas kernels.
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # A scan's stack of results begins as zeros, all of which it writes over: what is kept of 60 layers
    # is 45 GB. With this, XLA looks whether the loop covers the stack, and leaves out the zeros.
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
    # Per cent of the memory that XLA takes to be left beside the arguments. Where it thinks that a
    # program needs more, it computes results again in silence: 0.15 s of a step of 1.9 s, by bytes
    # counted in a program for an absent GPU (LOG.md). How much it believes there is depends on
    # XLA_PYTHON_CLIENT_MEM_FRACTION. Whether a step fits is known before (see `planning`), and what is
    # computed again is `train.recompute`. The price: instructions are not ordered for memory, 1 GiB
    # more for rows of 32,768.
    "xla_gpu_memory_limit_slop_factor": 1000,
}


def compiler_options() -> dict[str, bool | int] | None:
    """What XLA is told for programs that call these kernels in a scan over layers."""
    return dict(_OPTIONS) if on_hopper() else None


def on_hopper() -> bool:
    """By the name of the device at hand, or of the one that is compiled for (see `target`)."""
    return bool(HOPPER & set(device_kind().replace("-", " ").split()))
