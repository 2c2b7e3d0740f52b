"""Which devices a run is spread over, and whether it can be."""

import jax

from kimi_jax.config import RunConfig
from kimi_jax.model.layout import check_layout
from kimi_jax.parallel import processes
from kimi_jax.parallel.ranks import Ranks, make_ranks
from kimi_jax.planning import check_fits, device_memory
from kimi_jax.weights.checkpoint import Checkpoint


def place(config: RunConfig, checkpoint: Checkpoint) -> Ranks:
    """The ranks of a run on the devices that JAX sees.

    Raises:
        UserError: too few devices, experts or vocabulary that cannot be divided over them, or too
            little memory; nothing has been read or allocated by then.
    """
    ranks = make_ranks(config.mesh)
    check_layout(checkpoint.table, ranks)
    devices = list(ranks.mesh.local_devices) if ranks.mesh else jax.local_devices()[:1]
    memory = device_memory(devices)
    # Processes exchange their hosts' names only where the machine's memory is compared.
    shared = memory is None or config.train.offload
    here = processes.on_this_machine() if shared else 1
    check_fits(config, checkpoint.config, ranks, memory, len(devices), here)
    return ranks
