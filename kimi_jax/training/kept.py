"""Keeps whole compiled programs between processes, so that starting again skips lowering as well.

JAX's persistent cache keeps what XLA makes of a lowered program. Lowering the kernels of a train step takes
longer than all else then (LOG.md, 2026-11-27), so the executable is kept a second time, under a key that
is known once the step is traced.
"""

import hashlib
import logging
import os
import pickle
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh, NamedSharding

from kimi_jax.kernels.hopper import compiler_options

log = logging.getLogger(__name__)

CACHE_HIT = "/jax/compilation_cache/cache_hits"  # what JAX's monitoring calls it

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax", "optax", "numpy")
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
_SET = re.compile(r"frozenset\(\{([^{}]*)\}\)")

Options = Mapping[str, Any]


class Seconds(NamedTuple):
    """What a program took to get: `load` if it was kept, else `lower` and `compile`."""

    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    load: float = 0.0

    def describe(self) -> str:
        """In words."""
        if self.load:
            return f"traced in {self.trace:.1f} s, loaded in {self.load:.1f} s"
        return f"traced in {self.trace:.1f} s, lowered in {self.lower:.1f}, compiled in {self.compile:.1f}"


class KeptProgram:
    """A jitted function of one process whose executables are kept in JAX's compilation cache directory.

    Without `JAX_COMPILATION_CACHE_DIR`, or with several processes, it is the jitted function. Arguments of
    the same shapes must lie in the same places at every call, and the function be jitted without places
    for its results and with no other options than `kernels.hopper.compiler_options`. The files are as
    trustworthy as JAX's own: loading one runs what is in it. Nothing here removes old ones.
    """

    def __init__(self, jitted: Any, name: str) -> None:
        """`name` begins the files' names."""
        if directory() is not None:
            _sources()  # now, soon after they were imported: later they may have been edited
        self.jitted = jitted
        self.name = name
        self.seconds = Seconds()  # of the latest program
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Of arrays: the jitted function."""
        if directory() is None:
            return self.jitted(*args)
        leaves, tree = jax.tree.flatten(args)
        # Not their types themselves: those of a loaded program's results are equal to no others.
        signature = (tree, *((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves))
        if signature not in self._compiled:
            self._compiled[signature] = self.compile(*args)
        return self._compiled[signature](*args)

    def compile(self, *args: Any, options: Options | None = None) -> jax.stages.Compiled:
        """The program for arguments like these (arrays, or shapes with their places), kept or new.

        Args:
            args: of the function.
            options: for the compiler, beside those the function was jitted with.
        """
        began = time.perf_counter()
        args = jax.tree.map(_described, args)  # see `__call__`
        traced = self.jitted.trace(*args)
        kept = directory()
        path = kept and kept / f"kimi_jax-{self.name}-{_key(traced, args, options)}.program"
        after_trace = time.perf_counter()
        if path and (program := _load(path)) is not None:
            self.seconds = Seconds(after_trace - began, load=time.perf_counter() - after_trace)
            log.info("%s: loaded in %.1f s from %s", self.name, self.seconds.load, path)
            return program
        lowered = traced.lower()
        after_lower, hits = time.perf_counter(), _cache_hits()
        before = hits[0]
        program = lowered.compile(compiler_options=dict(options) if options else None)
        self.seconds = Seconds(
            after_trace - began, after_lower - after_trace, time.perf_counter() - after_lower
        )
        # What JAX took from its own cache cannot always be written again: on a CPU it loads and then fails.
        if path and hits[0] == before:
            _save(path, program)
        return program


def directory() -> Path | None:
    """Where programs are kept; None if they are not."""
    kept = jax.config.jax_compilation_cache_dir
    if not kept or "://" in kept or not jax.config.jax_enable_compilation_cache:
        return None
    return None if jax.process_count() > 1 else Path(kept)


@cache
def _cache_hits() -> list[int]:
    """A list of one number: how often JAX has taken a program from its cache since this was first asked."""
    found = [0]

    def heard(event: str, **_: Any) -> None:
        found[0] += event == CACHE_HIT

    jax.monitoring.register_event_listener(heard)
    return found


def _described(x: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(x, "weak_type", False)
    place = getattr(x, "sharding", None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place, weak_type=weak)


def _load(path: Path) -> Any | None:
    if not path.is_file():
        return None
    try:
        program, numbers = pickle.loads(path.read_bytes())
        by_number = {device.id: device for device in jax.devices()}
        devices = [by_number[number] for number in numbers]
        return deserialize_and_load(*program, execution_devices=devices)
    except Exception as error:  # whatever a damaged file makes of itself
        log.warning("%s cannot be loaded (%s); its program is compiled anew", path, error)
        return None


def _save(path: Path, program: Any) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        devices = [device.id for device in program.runtime_executable().local_devices()]
        content = pickle.dumps((serialize(program), devices))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except Exception as error:  # the program itself is good, whatever keeps it from being written
        log.warning("%s was not kept, so that the next start lowers again: %s", path, error)
        with suppress(OSError):
            unfinished.unlink()


def _key(traced: Any, args: Any, options: Options | None) -> str:
    """Of everything that the executable depends on: the traced program, places, compiler, sources."""
    jaxpr = traced.jaxpr
    text = _ADDRESS.sub("", _SET.sub(lambda found: _sorted(found[1]), str(jaxpr)))
    found = hashlib.sha256(text.encode())
    for constant in _constants(jaxpr):
        array = np.asarray(constant)
        found.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    devices = jax.devices()
    around = [
        str(traced.args_info),
        str(traced.out_info),
        [_place(leaf) for leaf in jax.tree.leaves(args)],
        sorted((options or {}).items()),
        sorted((compiler_options() or {}).items()),
        [(d.id, d.device_kind) for d in devices],
        devices[0].client.platform_version,
        os.environ.get("XLA_FLAGS", ""),
        _settings(),
        _versions(),
        _sources(),
    ]
    found.update(repr(around).encode())
    return found.hexdigest()[:32]


def _place(leaf: Any) -> tuple[Any, ...]:
    """One name for each place: P() of a matrix is P(None, None)."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return (str(sharding),)
    spec = (*sharding.spec, *[None] * (np.ndim(leaf) - len(sharding.spec)))
    mesh = sharding.mesh
    devices = [device.id for device in mesh.devices.flat]
    return spec, tuple(mesh.shape.items()), devices, sharding.memory_kind


def _sorted(names: str) -> str:
    return f"frozenset({sorted(names.split(', '))})"


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Of a closed program and all within it, which its text does not show."""
    # A kernel's references to its operands stand among its constants, without a value.
    yield from (value for value in jaxpr.consts if not isinstance(value, Tracer))
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=_closed):
            if _closed(value):
                yield from _constants(value)


def _closed(value: Any) -> bool:
    return hasattr(value, "consts") and hasattr(value, "eqns")


def _settings() -> list[tuple[str, str]]:
    """JAX's own, but for where and what it keeps."""
    plain = (bool, int, float, str, type(None))
    return sorted(
        (name, repr(value))
        for name, value in jax.config.values.items()
        if isinstance(value, plain) and "cache" not in name
    )


@cache
def _versions() -> list[str]:
    found = [platform.python_version()]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


@cache
def _sources() -> str:
    """Of this package's files: what a program's text may not show."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()
