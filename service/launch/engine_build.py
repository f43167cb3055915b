"""Engines built before a worker loads them, by `python -m export.trt` in a process of its own.

`service` and `export` import nothing of each other: they meet in the bundle. The builder skips engines that
are fresh, so this is quick from the second start on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditserve.commands import process_words
from ditserve.service.backends import BackendUnavailable

COMMAND = tuple(process_words("ditserve.export.trt"))


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """The progress of a build: engine `number` of `of` is being built, of which `share` (0..1) is done.

    While `owner` builds in the same folder, this build waits.
    """

    precision: str
    number: int
    of: int
    share: float = 0.0
    owner: str = ""

    def __str__(self) -> str:
        if self.owner:
            return f"waiting for the engines that {self.owner} builds"
        return f"building the {self.precision} engine ({self.number} of {self.of}): {self.share:.0%}"


async def build_engines(
    bundle: Path,
    *,
    precision: str = "auto",
    engines: Path | None = None,
    on_progress: Callable[[BuildProgress], None],
    stop: asyncio.Event,
    command: Sequence[str] = COMMAND,
) -> bool:
    """Build the engines that a worker of `precision` needs, unless they are fresh.

    Of several workers one builds, and the others wait for it. `on_progress` is called at every whole percent.
    Return False if `stop` was set meanwhile: the builder is then told to stop, and cleans up.

    Raises:
        BackendUnavailable: they cannot be built; the message is the builder's own sentence.
    """
    arguments = [*command, str(bundle), "--progress", "json", "--wait"]
    arguments += [] if precision == "auto" else ["--precision", precision]
    arguments += [] if engines is None else ["--engines", str(engines)]
    reason, progress = "it gave no reason", BuildProgress("", 0, 0)
    builder = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    stopping = asyncio.create_task(_terminate_on(stop, builder))
    try:
        assert builder.stdout is not None
        async for line in builder.stdout:
            event = _read_event(line)
            reason = event.get("error", reason)
            before, progress = progress, _next_progress(progress, event)
            if str(before) != str(progress):
                on_progress(progress)
        status = await builder.wait()
    finally:
        stopping.cancel()
    if status and not stop.is_set():
        raise BackendUnavailable(f"the engines cannot be built: {reason}")
    return not stop.is_set()


async def _terminate_on(stop: asyncio.Event, builder: asyncio.subprocess.Process) -> None:
    await stop.wait()
    with suppress(ProcessLookupError):
        builder.terminate()


def _read_event(line: bytes) -> dict[str, Any]:
    """Return one of the builder's JSON lines as a map, empty for a line that a library printed."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _next_progress(progress: BuildProgress, event: dict[str, Any]) -> BuildProgress:
    if event.get("event") == "waiting":
        return replace(progress, owner=event["owner"])
    if event.get("event") == "start":
        return BuildProgress(event["precision"], event["number"], event["of"])
    if event.get("event") == "step":
        return replace(progress, share=event["done"] / max(event["total"], 1))
    return progress
