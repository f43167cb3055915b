"""The systemd unit as tests read it: its settings, each with all its values, and its command line."""

from __future__ import annotations

import shlex
from collections import defaultdict
from pathlib import Path

UNIT = Path(__file__).parent.parent / "deploy/systemd/ditserve.service"
PREFIX = "/opt/ditserve/bin/"


def unit_settings() -> dict[str, list[str]]:
    """Return the values of every setting of the unit."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[name].append(value)
    return found


def exec_words() -> list[str]:
    """Return the words that the unit starts, without the folder of the environment."""
    (line,) = unit_settings()["ExecStart"]
    assert line.startswith(PREFIX)
    return shlex.split(line.removeprefix(PREFIX))
