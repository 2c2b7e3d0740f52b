"""Programs of all GPUs compiled beside a rank alone, into the persistent compilation cache."""

import os

import jax

from kimi_jax.parallel.ranks import make_ranks
from kimi_jax.training.absent import abstract_step
from kimi_jax.training.kept import Seconds
from tools.node_bench.size import Node
from tools.step_bench.rank import make_rank
from tools.step_bench.trace import NO_COMMAND_BUFFERS

VISIBLE = "CUDA_VISIBLE_DEVICES"


def environment(devices: int) -> dict[str, str]:
    """What lets it live beside a rank alone, which has nearly all memory of the first GPU.

    The compiler tries products out on the first GPU that it sees: the rank's is made its last.
    """
    known = os.environ.get(VISIBLE)
    first, *others = known.split(",") if known else [str(n) for n in range(devices)]
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", VISIBLE: ",".join([*others, first])}


def compile_step(node: Node, traced: bool) -> Seconds:
    """What it took to compile the step; nothing is run.

    Args:
        node: of the run.
        traced: whether the program is meant whose kernels say where they come from.
    """
    rank = make_rank(node.config, node.model, make_ranks(node.config.mesh))
    device = jax.devices()[0] if rank.ranks.mesh is None else None
    _, arguments = abstract_step(node.config, node.model, rank.ranks, device)
    program = rank.program()
    program.compile(*arguments, options=NO_COMMAND_BUFFERS if traced else None)
    return program.seconds
