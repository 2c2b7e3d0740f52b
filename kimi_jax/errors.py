"""Errors that a user can mend, told apart from defects of this program.

Commands turn a `UserError` into one message on standard error and exit code 2, a `RunStopped` into
one and exit code 3. Every other exception is a defect and keeps its traceback.
"""

from collections.abc import Sequence

LISTED_AT_MOST = 50


class UserError(ValueError):
    """Something a user gave is wrong. The message says what was found, what is required, what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that a user named, or that a named one implies, is absent."""

    def __str__(self) -> str:
        # FileNotFoundError formats (errno, strerror); here the message is the only argument.
        return str(self.args[0]) if self.args else ""


class RunStopped(RuntimeError):  # noqa: N818 - what happened, not whose error it is
    """A run ended before its last step, for a reason in its numbers. What was saved is kept."""


def listing(
    headline: str, problems: Sequence[str], remedy: str = "", at_most: int | None = LISTED_AT_MOST
) -> str:
    """One message out of many problems: headline, one line each, and what to do.

    At most `at_most` lines are printed (None: all); the rest is counted, never dropped in silence.
    """
    shown = [f"  - {problem}" for problem in problems[:at_most]]
    hidden = len(problems) - len(shown)
    if hidden > 0:
        shown.append(f"  - … and {hidden} more")
    return "\n".join([headline, *shown, *([remedy] if remedy else [])])
