"""What every command does with its outcome: exit codes, and one message for a user's mistake."""

import sys
from collections.abc import Callable, Sequence

from kimi_jax.errors import RunStopped, UserError

USER_ERROR = 2  # argparse's own exit code for a bad argument
STOPPED = 3
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
    try:
        main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
