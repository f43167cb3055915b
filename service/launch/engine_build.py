"""Engines built before a worker loads them, by `python -m export.trt` in a process of its own: service and export meet in the bundle.

What is fresh is not built again, so this is quick from the second start on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditserve.service.backends import BackendUnavailable

COMMAND = (sys.executable, "-m", "ditserve.export.trt")


@dataclass(frozen=True, slots=True)
class Building:
    """How far a build is: which of how many engines, and the share of it that is done, 0..1."""

    precision: str
    number: int
    of: int
    share: float = 0.0

    def __str__(self) -> str:
        return f"building the {self.precision} engine ({self.number} of {self.of}): {self.share:.0%}"


async def build_engines(
    bundle: Path,
    *,
    precision: str = "auto",
    engines: Path | None = None,
    told: Callable[[Building], None],
    stop: asyncio.Event,
    command: Sequence[str] = COMMAND,
) -> bool:
    """Have the engines that a worker of `precision` needs built, unless they are fresh; `told` hears of every whole percent.

    False if `stop` was set meanwhile: the build is then cancelled cleanly.

    Raises:
        BackendUnavailable: they cannot be built; the message is the builder's own sentence.
    """
    arguments = [*command, str(bundle), "--progress", "json"]
    arguments += [] if precision == "auto" else ["--precision", precision]
    arguments += [] if engines is None else ["--engines", str(engines)]
    reason, stands = "it gave no reason", Building("", 0, 0)
    child = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    cancelling = asyncio.create_task(_cancel(child, stop))
    try:
        assert child.stdout is not None
        async for line in child.stdout:
            event = _event(line)
            reason = event.get("error", reason)
            before, stands = stands, _next(stands, event)
            if str(before) != str(stands):
                told(stands)
        status = await child.wait()
    finally:
        cancelling.cancel()
    if status and not stop.is_set():
        raise BackendUnavailable(f"the engines cannot be built: {reason}")
    return not stop.is_set()


async def _cancel(child: asyncio.subprocess.Process, stop: asyncio.Event) -> None:
    """Pass on the wish to stop."""
    await stop.wait()
    with suppress(ProcessLookupError):
        child.terminate()


def _event(line: bytes) -> dict[str, Any]:
    """One of the builder's JSON lines; empty for what a library prints between them."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _next(stands: Building, event: dict[str, Any]) -> Building:
    if event.get("event") == "start":
        return Building(event["precision"], event["number"], event["of"])
    if event.get("event") == "step":
        return Building(stands.precision, stands.number, stands.of, event["done"] / max(event["total"], 1))
    return stands
