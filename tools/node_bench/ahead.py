"""The step of all GPUs compiled beside a rank alone, into the persistent compilation cache."""

import os
import time

from kimi_jax.parallel.ranks import make_ranks
from kimi_jax.training.absent import abstract_step
from tools.node_bench.size import Node

VISIBLE = "CUDA_VISIBLE_DEVICES"


def environment(devices: int) -> dict[str, str]:
    """What lets it live beside a rank alone, which has nearly all memory of the first GPU.

    The compiler tries products out on the first GPU that it sees: the rank's is made its last.
    """
    known = os.environ.get(VISIBLE)
    first, *others = known.split(",") if known else [str(n) for n in range(devices)]
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", VISIBLE: ",".join([*others, first])}


def compile_step(node: Node) -> tuple[float, float]:
    """Seconds to trace and lower the step, and to compile it; nothing is run."""
    began = time.perf_counter()
    step, arguments = abstract_step(node.config, node.model, make_ranks(node.config.mesh))
    lowered = step.lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return middle - began, time.perf_counter() - middle
