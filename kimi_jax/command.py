"""What every command does with its outcome: exit codes, and one message for a user's mistake."""

import logging
import sys
import traceback
from collections.abc import Callable, Sequence

from kimi_jax.errors import RunStopped, UserError

USER_ERROR = 2  # argparse's own exit code for a bad argument
STOPPED = 3
DEFECT = 1  # Python's own exit code for an exception
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def run_command(
    main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None
) -> None:
    """Runs a command's `main`; a user's mistake ends the process with a message, not a traceback.

    A `UserError` becomes `error: …` on standard error and exit code 2, a `RunStopped` `stopped: …`
    and 3, Ctrl-C exit code 130. Any other exception is a defect of this program and keeps its
    traceback.

    Args:
        main: takes the arguments, or None for those of the process.
        arguments: passed to `main`.
    """
    _show_log()
    try:
        main(arguments)
    except (UserError, RunStopped, KeyboardInterrupt) as error:
        sys.exit(report(error))


def _show_log() -> None:
    """The package's own log on standard error: which kernels are used, and why slow ones are.

    Through the root logger's handler: a library that logs makes one there if there is none, and with one
    of this package's own beside it every line would stand there twice.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kimi_jax").setLevel(logging.INFO)


def report(error: BaseException) -> int:
    """Says on standard error what ended the process, and returns the exit code for it."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    if isinstance(error, RunStopped):
        print(f"stopped: {error}", file=sys.stderr)
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    traceback.print_exception(error)
    return DEFECT
