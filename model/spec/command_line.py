"""The parts that the commands of `model`, `export` and `bench` share: how they end, and argument types."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from ditserve.model.spec.errors import ModelError

DONE, REFUSED, CANCELLED = 0, 2, 130


def guarded(program: str, work: Callable[[], None]) -> int:
    """Run `work` and return the exit status of the command.

    An error that the user can mend (ModelError, ValueError, OSError) is printed to stderr as one sentence,
    after the name of `program`, and gives status 2. Ctrl-C gives status 130. Any other error is a fault of
    ours and passes through.
    """
    try:
        work()
    except (ModelError, ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{program}: cancelled", file=sys.stderr)
        return CANCELLED
    return DONE


def positive(text: str) -> int:
    """Return the whole number that a command-line argument says, which must be at least 1.

    Raises:
        argparse.ArgumentTypeError: `text` is anything else.
    """
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)
