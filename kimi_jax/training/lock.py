"""One writer for each run directory: a second would cut the record and remove half-written checkpoints."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_jax.errors import UserError

LOCK = "lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold(run_dir: Path) -> Iterator[bool]:
    """Holds the run directory for writing while the block runs; the system lets go of a killed process's.

    Yields:
        Whether it is held: some network file systems know no locks.

    Raises:
        UserError: another process holds it.
    """
    held = True
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run_dir}: another process is writing this run; wait for its end, or set run.dir to a new "
                "directory"
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            held = False
        yield held
