"""Times and memory of PyTorch's part, all on the GPU that the process has."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

GIB = 2**30
WARM_UP = 2


def timed(step: Callable[[], Any], calls: int) -> float:
    """Median milliseconds of a call by the GPU's own clock, each waited for."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def timed_with_peak(step: Callable[[], Any], calls: int) -> tuple[float, float]:
    """`timed`, and the largest GiB allocated meanwhile."""
    torch.cuda.reset_peak_memory_stats()
    return timed(step, calls), torch.cuda.max_memory_allocated() / GIB


def first_line(error: BaseException) -> str:
    """What an exception says, in short."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"


def versions() -> dict[str, str]:
    """Of what the measurement ran with."""
    from importlib.metadata import version

    names = ("torch", "triton", "transformers", "peft")
    found = {name: version(name) for name in names}
    cudnn = torch.backends.cudnn.version()
    return {**found, "CUDA of torch": str(torch.version.cuda), "cuDNN of torch": str(cudnn)}
