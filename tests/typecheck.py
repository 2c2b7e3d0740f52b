"""The type checker that pytest puts on every function of the package: array annotations alone.

jaxtyping's import hook names `check_arrays`. Other annotations are pyright's business; tests of
refusals pass values of other types on purpose.
"""

from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_arrays(function: Any) -> Any:
    """beartype, for those of a function's annotations that state dtype and shape."""
    hints = function.__annotations__
    function.__annotations__ = {
        name: hint for name, hint in hints.items() if speaks_of_arrays(hint)
    }
    return beartype(function)


def speaks_of_arrays(hint: Any) -> bool:
    """Whether a jaxtyping annotation stands anywhere in `hint`."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(speaks_of_arrays(part) for part in get_args(hint))
