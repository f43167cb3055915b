"""Engines built before a worker loads them, by `python -m export.trt` in a process of its own: service and export meet in the bundle.

What is fresh is not built again, so this is quick from the second start on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from service.backends import BackendUnavailable

COMMAND = (sys.executable, "-m", "export.trt")


@dataclass(frozen=True, slots=True)
class Building:
    """How far a build is: which of how many engines, and the share of it that is done, 0..1."""

    precision: str
    number: int
    of: int
    share: float = 0.0

    def __str__(self) -> str:
        return f"building the {self.precision} engine ({self.number} of {self.of}): {self.share:.0%}"


def build_engines(
    bundle: Path,
    *,
    precision: str = "auto",
    engines: Path | None = None,
    told: Callable[[Building], None],
    command: Sequence[str] = COMMAND,
) -> None:
    """Have the engines that a worker of `precision` needs built, unless they are fresh; `told` hears of every whole percent.

    SIGTERM and Ctrl-C cancel the build cleanly and then end this process.

    Raises:
        BackendUnavailable: they cannot be built; the message is the builder's own sentence.
    """
    arguments = [*command, str(bundle), "--progress", "json"]
    arguments += [] if precision == "auto" else ["--precision", precision]
    arguments += [] if engines is None else ["--engines", str(engines)]
    reason, stands = "it gave no reason", Building("", 0, 0)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child, _cancelling(child):
        assert child.stdout is not None
        for event in _events(child.stdout):
            reason = event.get("error", reason)
            before, stands = stands, _next(stands, event)
            if str(before) != str(stands):
                told(stands)
    if child.returncode:
        raise BackendUnavailable(f"the engines cannot be built: {reason}")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The builder's JSON lines; what a library prints between them is passed over."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def _next(stands: Building, event: dict[str, Any]) -> Building:
    if event["event"] == "start":
        return Building(event["precision"], event["number"], event["of"])
    if event["event"] == "step":
        return Building(stands.precision, stands.number, stands.of, event["done"] / max(event["total"], 1))
    return stands


@contextmanager
def _cancelling(child: subprocess.Popen[str]) -> Iterator[None]:
    """Pass on the wish to stop as the Ctrl-C that the builder understands, and end when it has."""

    def stop(number: int, _: FrameType | None) -> None:
        child.send_signal(signal.SIGINT)
        child.wait()
        raise SystemExit(128 + number)

    kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
