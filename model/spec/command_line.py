"""What the command lines of `model`, `export` and `bench` share: one way to end, and types of arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ditserve.model.spec.errors import ModelError

DONE, REFUSED = 0, 2


def guarded(program: str, work: Callable[[], None]) -> int:
    """Do `work` and return the exit status: a user's mistake is one sentence on stderr and status 2."""
    try:
        work()
    except (ModelError, ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return REFUSED
    return DONE


def positive(text: str) -> int:
    """A whole number from 1 on, of a command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)
