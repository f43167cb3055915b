"""Progress of builds: bars in a terminal, or JSON lines for a program that started the build.

Both can cancel the build.

The lines are:

    {"event": "waiting", "owner": …}            another process builds there
    {"event": "start", "precision": …, "number": 1, "of": 2}
    {"event": "phase", "precision": …, "phase": …}
    {"event": "step", "precision": …, "done": 3, "total": 13}
    {"event": "done", "precision": …, "state": …, "seconds": …}
    {"event": "failed", "error": …}
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ditserve.export.tensorrt.build import Monitor

LEVELS = 3  # levels of nested phases that are shown


class CancellableMonitor(Monitor, Protocol):
    """A monitor that stops its build at the next step after `cancel`."""

    def cancel(self) -> None: ...


@dataclass(slots=True)
class BarMonitor:
    """A monitor that shows the phases of a build as nested progress bars."""

    progress: Progress
    cancelled: bool = False
    tasks: dict[str, TaskID] = field(default_factory=dict)
    depth: dict[str, int] = field(default_factory=dict)

    def cancel(self) -> None:
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.depth[phase] = self.depth.get(parent or "", -1) + 1
        if self.depth[phase] < LEVELS:
            self.tasks[phase] = self.progress.add_task("  " * self.depth[phase] + phase[:60], total=steps)

    def step(self, phase: str, step: int) -> bool:
        if phase in self.tasks:
            self.progress.update(self.tasks[phase], completed=step + 1)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        if phase in self.tasks:
            self.progress.remove_task(self.tasks.pop(phase))


@dataclass(slots=True)
class EventMonitor:
    """A monitor that emits the outermost phases of a build as events."""

    precision: str
    emit: Callable[[dict[str, Any]], None]
    cancelled: bool = False
    steps: dict[str, int] = field(default_factory=dict)

    def cancel(self) -> None:
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        if parent is None:
            self.steps[phase] = steps
            self.emit({"event": "phase", "precision": self.precision, "phase": phase})

    def step(self, phase: str, step: int) -> bool:
        if phase in self.steps:
            done = {"done": step + 1, "total": self.steps[phase]}
            self.emit({"event": "step", "precision": self.precision, **done})
        return not self.cancelled

    def finish(self, phase: str) -> None:
        self.steps.pop(phase, None)


@dataclass(frozen=True, slots=True)
class ProgressReporter:
    """A reporter of builds, one after another: a monitor for each precision, and events between builds."""

    monitor: Callable[[str], CancellableMonitor]
    report: Callable[[dict[str, Any]], None]


@contextmanager
def terminal_reporter(console: Console) -> Iterator[ProgressReporter]:
    """Show bars while a build runs; events are not shown, the table at the end has them."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)

    def monitor(_: str) -> CancellableMonitor:
        progress.start()
        return BarMonitor(progress)

    try:
        yield ProgressReporter(monitor, lambda _: None)
    finally:
        progress.stop()


@contextmanager
def json_reporter() -> Iterator[ProgressReporter]:
    """Print each event as one JSON object a line on stdout."""

    def report(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    yield ProgressReporter(lambda precision: EventMonitor(precision, report), report)


@contextmanager
def interruptible(monitor: CancellableMonitor) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM cancel the build. An exception raised inside TensorRT would be lost."""

    def on_interrupt(_: int, __: FrameType | None) -> None:
        monitor.cancel()

    previous = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
