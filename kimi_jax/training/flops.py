"""Work and memory of a step, for the step line.

Convention: a frozen matmul costs 2N forward and 2N for its input's gradient, N the active
parameters a token without the embedding; no gradient of a frozen weight, no recomputation, no
attention scores are counted. That is "4N" FLOP a token.
"""

import resource
from collections.abc import Sequence

import jax

from kimi_jax.model.config import ModelConfig
from kimi_jax.model.params import Weight
from kimi_jax.planning.flops import active_parameters

# Dense bf16 FLOP/s by device kind, from NVIDIA's datasheets. Unlisted devices show no MFU.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}


def flops_per_token(table: Sequence[Weight], config: ModelConfig) -> int:
    """4N: forward and input-gradient of one token through frozen weights."""
    return 4 * active_parameters(table, config)


def model_flops_utilisation(tokens_per_second: float, flops: int, devices: int) -> float | None:
    """Useful FLOP/s over the peak of the mesh's devices, or None where the peak is not known."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else tokens_per_second * flops / (peak * devices)


def peak_memory() -> tuple[int, str]:
    """Largest number of bytes in use so far, and whose: `device`, or `host` where devices do not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "host"
