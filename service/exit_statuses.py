"""The exit statuses of all commands, which the table of docs/operations.md explains."""

import sys
from typing import Final

DONE: Final = 0  # told to stop, and drained; or the command did what it was asked
FAILED: Final = 1  # while running: another start may help
MISCONFIGURED: Final = 2  # no start can help before somebody has mended the configuration

_HINT: Final = f"exit status {MISCONFIGURED}: starting this again does not help before it is mended"


def refuse(error: Exception | str) -> int:
    """Tell a mistake in the configuration in one line on stderr; return the exit status.

    Where nobody watches, and something may start the process again and again, the line says that it is no
    use.
    """
    hint = "" if sys.stderr is not None and sys.stderr.isatty() else f" ({_HINT})"
    print(f"error: {error}{hint}", file=sys.stderr)
    return MISCONFIGURED
