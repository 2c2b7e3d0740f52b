"""The run directory: what is in it, and whether a run may go on in it.

config.yaml       the resolved configuration
run.json          versions, and the fingerprint of the base
metrics.jsonl     the record of the run; everything else is a view of it
checkpoints/      adapters, optimizer, data position, by step
tensorboard/  loss.png
lock              held by the process that writes here
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import yaml

from kimi_jax.config import RunConfig
from kimi_jax.config_file import dump_config, load_config
from kimi_jax.errors import MissingFileError, UserError, listing

CONFIG = "config.yaml"
FACTS = "run.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
_PACKAGES = ("kimi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What may differ when a run goes on, sections or fields: none of it changes a number of the training
# beyond rounding.
_MAY_DIFFER = {
    "run.dir",
    "evaluate.",
    "mesh.",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_checkpoints",
    "train.offload",
    "train.recompute",
}


def prepare(directory: Path, config: RunConfig, base_fingerprint: str) -> bool:
    """Makes the run directory, or checks that this configuration goes on with what is in it.

    Returns:
        Whether the directory held a run before.

    Raises:
        UserError: the directory holds something else, or a run of another configuration or base.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; set run.dir to a new directory")
    if not directory.exists() or not any(directory.iterdir()):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be made: {error.strerror}; set run.dir to another place"
            ) from error
        facts = {
            "base_fingerprint": base_fingerprint,
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        # The configuration comes last: it marks the directory as a run's.
        _write(directory / FACTS, json.dumps(facts, indent=2) + "\n")
        _write(directory / CONFIG, dump_config(config))
        return False
    if not (directory / CONFIG).is_file():
        if {path.name for path in directory.iterdir()} <= {FACTS, FACTS + ".tmp", CONFIG + ".tmp"}:
            for path in directory.iterdir():  # killed while it was being made
                path.unlink()
            return prepare(directory, config, base_fingerprint)
        raise UserError(
            f"{directory}: not empty and not a run directory (no {CONFIG}); set run.dir to a new one"
        )
    check(directory, config, base_fingerprint)
    return True


def record_config(directory: Path, config: RunConfig) -> None:
    """Writes the configuration that a run goes on with. Only the process that holds the run may."""
    _write(directory / CONFIG, dump_config(config))


def check(directory: Path, config: RunConfig, base_fingerprint: str) -> None:
    """Refuses a run of another configuration or base, as far as either changes its numbers.

    Raises:
        MissingFileError: not a run directory.
        UserError: every field that differs; another base.
    """
    differing = _differences(read_config(directory), config)
    if differing:
        raise UserError(
            listing(
                f"{directory}: holds a run of another configuration",
                differing,
                "Go on with the configuration of the run, or set run.dir to a new directory.",
            )
        )
    check_base(directory, base_fingerprint)


def read_config(directory: Path) -> RunConfig:
    """The configuration of an existing run.

    Raises:
        MissingFileError: not a run directory.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise MissingFileError(f"{directory}: not a run directory: {CONFIG} is not there")
    return load_config(path)


def check_base(directory: Path, base_fingerprint: str) -> None:
    """Refuses a base that is not the one the run trained on."""
    found = read_facts(directory)["base_fingerprint"]
    if found != base_fingerprint:
        raise UserError(
            f"{directory}: this run trained on another base (fingerprint {found[:12]}…, now "
            f"{base_fingerprint[:12]}…); restore the checkpoint directory, or use a new run.dir"
        )


def read_facts(directory: Path) -> dict[str, Any]:
    """Versions and the base's fingerprint of an existing run."""
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        assert isinstance(facts["base_fingerprint"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{directory / FACTS}: not readable: {error!r}; the run is damaged"
        ) from error
    return facts


def _differences(before: RunConfig, now: RunConfig) -> list[str]:
    old, new = (yaml.safe_load(dump_config(config)) for config in (before, now))
    problems = []
    for section, fields in new.items():
        for field, value in fields.items():
            key = f"{section}.{field}"
            if old[section][field] == value or {key, f"{section}."} & _MAY_DIFFER:
                continue
            if key == "train.steps" and now.train.schedule == "constant":
                continue  # a constant rate does not depend on where the run ends
            problems.append(f"{key}: the run has {old[section][field]!r}, now {value!r}")
    return problems


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from the source tree


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
