"""How much memory JAX may use, of GPUs and of the machine.

Both are settings in the environment, which it reads when it first sees a device.
"""

import os
from pathlib import Path

from kimi_jax.errors import UserError

FRACTION_SETTING, DEFAULT_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75  # of a GPU's
ADVISED_FRACTION = 0.92  # leaves NCCL, CUDA and libraries what they take beside JAX
# Of the machine's memory that GPUs read and write by themselves, GB for a process (2³⁰ bytes each).
HOST_SETTING, DEFAULT_HOST_GB = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may have, or `max`


def allow_jax_memory(fraction: float = ADVISED_FRACTION) -> None:
    """Lets JAX use this part of each GPU and what the machine has, unless the environment says otherwise."""
    os.environ.setdefault(FRACTION_SETTING, str(fraction))
    os.environ.setdefault(HOST_SETTING, str(max(DEFAULT_HOST_GB, host_memory() >> 30)))


def host_memory() -> int:
    """Bytes of memory that this machine has, or that this container of it may have."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(_CGROUP.read_text(encoding="ascii")))
    except (OSError, ValueError):  # none, or no limit
        return memory


def allowed_host_memory() -> int:
    """Bytes of the machine's memory that arrays of GPUs may take in this process.

    Raises:
        UserError: the setting is no number.
    """
    limit = os.environ.get(HOST_SETTING, str(DEFAULT_HOST_GB))
    if not limit.isdecimal():
        raise UserError(f"{HOST_SETTING} is {limit!r}; required: whole GB, or not set")
    return min(int(limit) << 30, host_memory())
