"""From axis letters to mesh axes: where the dimensions of an array go."""

import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from kimi_jax.axes import AXES
from kimi_jax.errors import UserError
from kimi_jax.parallel.mesh import EXPERT

RULES: Mapping[str, str] = {"E": EXPERT, "V": EXPERT}
"""Experts and the vocabulary are spread; other letters' dimensions are whole on every rank."""


def partition(
    axes: str, rules: Mapping[str, str] = RULES, rows: str | None = None
) -> PartitionSpec:
    """The spec of an array whose dimensions `axes` spells, as `kimi_jax.model.params.Weight` does.

    Args:
        axes: dimensions separated by spaces; `N*H+R` is a product of factors.
        rules: letter to mesh axis.
        rows: a mesh axis for the first dimension, whatever its letters are.

    Raises:
        UserError: a rule for an unknown letter, or one mesh axis for two dimensions of an array.
    """
    unknown = sorted(set(rules) - set(AXES))
    if unknown:
        raise UserError(f"sharding rules for letters that are not axes: {', '.join(unknown)}")
    entries: list[str | None] = []
    for number, dimension in enumerate(axes.split()):
        letters = dimension.replace("*", "+").split("+")
        found = {rules[letter] for letter in letters if letter in rules}
        if rows is not None and number == 0:
            found.add(rows)
        if len(found) > 1:
            raise UserError(
                f"dimension {dimension!r} of {axes!r} is given {sorted(found)}: one only"
            )
        entries.append(found.pop() if found else None)
    used = [entry for entry in entries if entry is not None]
    for axis in set(used):
        if used.count(axis) > 1:
            raise UserError(
                f"mesh axis {axis!r} is given to {used.count(axis)} dimensions of {axes!r}; it can "
                "spread one of them"
            )
    return PartitionSpec(*entries)


def local_shape(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh_shape: Mapping[str, int]
) -> tuple[int, ...]:
    """One rank's part of an array.

    Raises:
        UserError: a dimension that cannot be cut into equal parts.
    """
    local = list(shape)
    for dimension, entry in enumerate(spec):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        parts = math.prod(mesh_shape.get(axis, 1) for axis in axes)
        if local[dimension] % parts:
            over = " × ".join(f"mesh.{axis}" for axis in axes)
            raise UserError(
                f"{name}: {local[dimension]} cannot be divided over {over} = {parts}; "
                f"{local[dimension]} / {parts} is not a whole number"
            )
        local[dimension] //= parts
    return tuple(local)
