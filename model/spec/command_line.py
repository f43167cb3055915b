"""The parts that the commands of `model`, `export` and `bench` share: how they end, and argument types."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ditserve.model.spec.errors import ModelError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
DONE, REFUSED, CANCELLED = 0, 2, 130


def guarded(program: str, work: Callable[[], None]) -> int:
    """Run `work` and return the exit status of the command.

    An error that the user can mend (ModelError, ValueError, OSError, too little memory) is printed to stderr
    as one sentence, after the name of `program`, and gives status 2. Ctrl-C gives status 130, and its
    own sentence if it has one. Any other error is a fault of ours and passes through.
    """
    try:
        work()
    except (ModelError, ValueError, OSError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            sentence = f"{error.filename} cannot be used: {error.strerror}"
        print(f"{program}: {sentence}", file=sys.stderr)
        return REFUSED
    except (MemoryError, OverflowError, RuntimeError) as error:
        # PyTorch has no class of its own for a CPU that runs out of memory.
        if type(error) is RuntimeError and not re.search("allocate|overflow", str(error)):
            raise
        print(f"{program}: a number is too large for this machine: ask for less", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt as interrupt:
        print(f"{program}: {str(interrupt) or 'cancelled'}", file=sys.stderr)
        return CANCELLED
    return DONE


def printable(text: str) -> str:
    """Return text of others as a terminal may show it: escapes and other control characters become "?"."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def positive(text: str) -> int:
    """Return the whole number that a command-line argument says, which must be at least 1.

    Raises:
        argparse.ArgumentTypeError: `text` is anything else.
    """
    return _whole(text, 1)


def count(text: str) -> int:
    """Return the whole number that a command-line argument says, which must be at least 0.

    Raises:
        argparse.ArgumentTypeError: `text` is anything else.
    """
    return _whole(text, 0)


def thread_count(text: str) -> int:
    """Return the number of compute threads that a command-line argument says, 1 to 1,024.

    Raises:
        argparse.ArgumentTypeError: `text` is anything else.
    """
    number = _whole(text, 1)
    if number > 1024:
        raise argparse.ArgumentTypeError(f"must be at most 1024, not {text}")
    return number


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
    return int(text)


def finite(text: str) -> float:
    """Return the number that a command-line argument says, neither NaN nor infinite.

    Raises:
        argparse.ArgumentTypeError: `text` is anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, not {text}")
    return number


def share(text: str) -> float:
    """Return the number in 0..1 that a command-line argument says.

    Raises:
        argparse.ArgumentTypeError: `text` is anything else.
    """
    number = finite(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0..1, not {text}")
    return number


def named_path(text: str) -> Path:
    """Return the path that a command-line argument says, which must not be empty: that would be "."

    Raises:
        argparse.ArgumentTypeError: `text` is empty.
    """
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("must name a file or a folder, not nothing")
    return Path(text)


def picture_file(text: str) -> Path:
    """Return the path of a picture to write, as a command-line argument says it.

    Raises:
        argparse.ArgumentTypeError: its suffix is of no known format, or no file can be written there.
    """
    file = named_path(text)
    if file.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}, not {text}")
    try:
        existing = next(folder for folder in file.absolute().parents if folder.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK) and not file.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: choose a file in a folder that can be")
    return file
