"""Reads a run's configuration: YAML file, overrides, and one message with every problem in it."""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kimi_jax.config import MeshSection, RunConfig
from kimi_jax.errors import MissingFileError, UserError, listing

_MERGE = "tag:yaml.org,2002:merge"  # the key `<<`


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below, with its line
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a dot in every float; YAML 1.2 and everyone else do not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    """An integer; YAML 1.1's octal `012`, hexadecimal and sexagesimal `1:30` are refused."""
    if not re.fullmatch(r"[-+]?(0|[1-9][\d_]*)", node.value):
        raise yaml.constructor.ConstructorError(
            None, None, f"write {node.value!r} as a decimal number", node.start_mark
        )
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def load_config(
    source: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()
) -> RunConfig:
    """Makes a `RunConfig` of a YAML file's path, a nested dictionary, or a `RunConfig`.

    Args:
        source: the file or the values.
        overrides: `section.field=value`, the value in YAML's notation; they win over the source.

    Raises:
        UserError: every unknown key, missing key and bad value, all in one message.
    """
    if isinstance(source, RunConfig):
        values: dict[str, Any] = source.model_dump()
        name = "the configuration"
    elif isinstance(source, Mapping):
        values = {key: dict(v) if isinstance(v, Mapping) else v for key, v in source.items()}
        name = "the configuration"
    else:
        values, name = _read_yaml(Path(source)), str(source)
    for override in overrides:
        _apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _refusal(name, error) from error


def read_mesh(values: Mapping[str, Any]) -> MeshSection:
    """The `mesh` section alone, of a dictionary.

    Raises:
        UserError: as for a whole configuration.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"mesh: found {type(values).__name__}, required a mapping like {{'expert': 8}} or a MeshSection"
        )
    try:
        return MeshSection.model_validate(dict(values))
    except ValidationError as error:
        raise _refusal("mesh", error, ("mesh",)) from error


def _refusal(name: str, error: ValidationError, section: tuple[str, ...] = ()) -> UserError:
    problems = [_describe({**e, "loc": (*section, *e["loc"])}) for e in error.errors()]
    headline = (
        f"{name}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration"
    )
    return UserError(listing(headline, problems))


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such configuration file; pass --config with a YAML file"
        )
    try:
        # Subclass of SafeLoader: it builds plain values only.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a day 32
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: found {type(values).__name__}, required sections: {', '.join(RunConfig.model_fields)}"
        )
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    section, dot, field = path.strip().partition(".")
    if not (separator and dot and section and field):
        raise UserError(
            f"override {override!r}: write it as section.field=value, like train.steps=100"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"override {override!r}: the value is not readable as YAML: {error}"
        ) from error
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise UserError(f"override {override!r}: {section} is not a section")
    target[field] = value


def _describe(error: Any) -> str:
    """One pydantic error in the project's words: where, what was found, what is required."""
    location = ".".join(str(part) for part in error["loc"])
    kind, found = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{location}: unknown key; {hint}"
    if kind == "missing":
        return f"{location}: missing; a run must decide it"
    # YAML knows lists only.
    message = error["msg"].replace("Tuple", "List").replace("tuple", "list")
    message = message.removeprefix("Value error, ")
    if not location:
        return message
    return (
        f"{location}: {message}; found {found!r}"
        if not isinstance(found, dict)
        else f"{location}: {message}"
    )


def _fields_at(location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
