"""Several processes as one program: found, started, kept in step, and ended together.

Every process runs the same program over the same global arrays; what only one may do (files, the
console) the first does. Each exchange here is made by all processes, or none of them goes on.
"""

import json
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from kimi_jax.errors import RunStopped, UserError, listing

START_SECONDS = 300  # that processes wait for each other at the start
HEARTBEAT_SECONDS = 30  # after which a silent process counts as dead, and the others end
_WAIT_SECONDS = 1800  # at a place where one process may have to read or compile for long
_END_SECONDS = 60  # for the slowest to come to the end
_GRACE_SECONDS = 3  # the first leaves last: it serves what the others learn of each other

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_OPTIONS = ("--coordinator", "--processes", "--process")


class Settings(NamedTuple):
    """What a process is told. coordinator: HOST:PORT of the first; process: number of this one."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


NOTHING_GIVEN = Settings()


def start(given: Settings = NOTHING_GIVEN, timeout: int = START_SECONDS) -> None:
    """Joins the processes of this run, before any device is touched. Does nothing for one process.

    `given` wins over the variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`; without either, Slurm, Open MPI and indexed Kubernetes jobs are found as
    `jax.distributed` finds them. Where a launcher starts one process a node, it gets all GPUs of the
    node unless `JAX_LOCAL_DEVICE_IDS` names some; where it starts several, each gets one.

    Raises:
        UserError: settings that are incomplete or contradict each other, a cluster that is not
            understood.
    """
    settings = _settings(given)
    if settings.processes == 1:
        return
    cluster = _cluster()
    if cluster is None:
        if not any(value is not None for value in settings):
            return
        _check_complete(settings)
    # Its handler would swallow SIGTERM wherever the training loop's own is not in place.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(10, _say_waiting, (settings, cluster, timeout))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            *settings,
            cluster_detection_method=None if cluster else "deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{cluster or 'the processes of this run'}: the start failed: {error}\n"
            f"Give all of {', '.join(_OPTIONS)}, or --processes 1 to run as one process."
            + (" Finding them in Kubernetes takes the package `kubernetes`." if cluster else "")
        ) from error
    finally:
        waiting.cancel()
    if _one_a_node(cluster) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # JAX takes every process of a launcher for one of several on its node, with one GPU each.
        jax.config.update("jax_cuda_visible_devices", "all")


def count() -> int:
    """Processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


@cache
def on_this_machine() -> int:
    """How many processes of this run share this machine: all that tell the same name of their host.

    An exchange of all processes.
    """
    if count() == 1:
        return 1
    name = np.asarray(zlib.crc32(socket.gethostname().encode()) >> 1, np.int32)
    return int(np.sum(multihost_utils.process_allgather(name) == name))


def on_first(action: Callable[[], Any]) -> Any:
    """What `action`, run by the first process alone, returns or refuses; every process gets it.

    Args:
        action: returns what JSON can hold.

    Raises:
        UserError, RunStopped: on every process, if `action` raises it.
    """
    if count() == 1:
        return action()
    outcome: dict[str, Any] = {}
    failure: BaseException | None = None
    if is_first():
        try:
            outcome = {"value": action()}
        except Exception as error:
            failure = error
            known = [kind.__name__ for kind in (UserError, RunStopped) if isinstance(error, kind)]
            outcome = {"kind": (known or ["defect"])[0], "message": str(error)}
    outcome = json.loads(_from_first(json.dumps(outcome)))
    if failure is not None:
        raise failure
    if "kind" in outcome:
        kind = UserError if outcome["kind"] == "UserError" else RunStopped
        raise kind(f"on process 0: {outcome['message']}")
    return outcome["value"]


def largest_soon(number: int) -> Callable[[], int]:
    """The largest of the processes' numbers, which all learn: how they agree to stop.

    Asked now, awaited when what is returned is called. Devices exchange the numbers behind what they
    were given before, and ahead of what comes after.
    """
    if count() == 1:
        return lambda: number
    devices = np.asarray(jax.devices()).reshape(count(), -1)
    mesh = Mesh(devices, ("processes", "devices"))
    numbers = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("processes")), np.asarray([number], np.int32)
    )
    found = _maximum(NamedSharding(mesh, PartitionSpec()))(numbers)
    return lambda: int(found.addressable_data(0))


def wait_for_all(where: str) -> None:
    """Returns when every process has come to the place that `where` names, once in a run.

    No exchange between devices: those have short time-outs of their own on CPUs. Call it where
    processes may arrive far apart.
    """
    # Imported here: only several processes need it. It is the one public way to such a barrier.
    import orbax.checkpoint as ocp

    ocp.multihost.get_barrier_sync_fn()(key=where, timeout_ms=_WAIT_SECONDS * 1000)


def to_host(tree: Any) -> Any:
    """Every array as a whole NumPy array, on every process. Leaf by leaf: a device holds one whole."""

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


@contextmanager
def ended_together(report: Callable[[BaseException], int]) -> Iterator[None]:
    """If the block fails on one of several processes, this process ends at once.

    The ordinary way out waits for the others, who may be waiting for this one. They end when their
    next exchange fails, or after `HEARTBEAT_SECONDS`, and say that another process died.

    Args:
        report: says what went wrong, and returns the exit code.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1:
            raise
        print(f"process {jax.process_index()} of {count()} ends the run:", file=sys.stderr)
        code = report(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            print("If another process died, its own output says why.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            time.sleep(_GRACE_SECONDS)
        os._exit(code)


@cache
def _maximum(everywhere: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.max, out_shardings=everywhere)


def _settings(given: Settings) -> Settings:
    coordinator, *numbers = (os.environ.get(name) or None for name in _VARIABLES)
    try:
        processes, process = (None if text is None else int(text) for text in numbers)
    except ValueError as error:
        raise UserError(
            f"{' and '.join(_VARIABLES[1:])}: required: whole numbers: {error}"
        ) from error
    found = Settings(coordinator, processes, process)
    chosen: list[Any] = [a if a is not None else b for a, b in zip(given, found, strict=True)]
    settings, problems = Settings(*chosen), []
    address, total, number = settings
    if address is not None and not (":" in address and address.rsplit(":", 1)[1].isdigit()):
        problems.append(f"--coordinator {address}: required: HOST:PORT")
    if total is not None and total < 1:
        problems.append(f"--processes {total}: required: at least 1")
    elif number is not None and not 0 <= number < (total or number + 1):
        problems.append(f"--process {number}: required: from 0 to {(total or 1) - 1}")
    if problems:
        raise UserError(listing("the processes of this run", problems))
    return settings


def _check_complete(settings: Settings) -> None:
    missing = [
        f"{option} (or {variable})"
        for option, variable, value in zip(_OPTIONS, _VARIABLES, settings, strict=True)
        if value is None
    ]
    if missing:
        raise UserError(
            listing(
                "the processes of this run: only a part of their settings is given; missing",
                missing,
                "Give all three to each process, or none of them to run as one process.",
            )
        )


def _cluster() -> str | None:
    """The launcher that started several processes, as far as its variables tell."""
    environment = os.environ
    if all(name in environment for name in _SLURM):
        return "Slurm" if int(environment["SLURM_NTASKS"]) > 1 else None
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def _one_a_node(cluster: str | None) -> bool:
    if cluster == "Slurm":  # "1(x2)", or "2,1" where nodes differ
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        return tasks.split("(")[0] == "1"
    if cluster == "Open MPI":
        return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return False  # JAX restricts no one else


def _say_waiting(settings: Settings, cluster: str | None, timeout: int) -> None:
    address, total, number = settings
    who = f"process {number} of {total}" if number is not None else f"a process of {cluster}"
    where = f" at {address}" if address else ""
    print(
        f"{who} waits for the others{where}, where process 0 receives them, {timeout} s at most. "
        "Each must be started, with the same settings but its number, and must reach that address.",
        file=sys.stderr,
        flush=True,
    )


def _from_first(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    if not is_first():
        data = np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().decode()
