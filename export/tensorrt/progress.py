"""How far a build is: bars in a terminal, or JSON lines for whoever started it. Both can be cancelled.

Lines: {"event": "start", "precision": …, "number": 1, "of": 2}, {"event": "phase", "precision": …, "phase": …},
{"event": "step", "precision": …, "done": 3, "total": 13}, {"event": "done", "precision": …, "state": …, "seconds": …}.
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

DEEPEST = 3  # levels of phases that are shown


class Cancellable(Protocol):
    """A build's monitor that can be told to stop it."""

    def cancel(self) -> None: ...

    def start(self, phase: str, parent: str | None, steps: int) -> None: ...

    def step(self, phase: str, step: int) -> bool: ...

    def finish(self, phase: str) -> None: ...


@dataclass(slots=True)
class Bars:
    """A build's phases as nested progress bars; `cancel` makes TensorRT stop at its next step."""

    progress: Progress
    cancelled: bool = False
    tasks: dict[str, TaskID] = field(default_factory=dict)
    depth: dict[str, int] = field(default_factory=dict)

    def cancel(self) -> None:
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.depth[phase] = self.depth.get(parent or "", -1) + 1
        if self.depth[phase] < DEEPEST:
            self.tasks[phase] = self.progress.add_task("  " * self.depth[phase] + phase[:60], total=steps)

    def step(self, phase: str, step: int) -> bool:
        if phase in self.tasks:
            self.progress.update(self.tasks[phase], completed=step + 1)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        if phase in self.tasks:
            self.progress.remove_task(self.tasks.pop(phase))


@dataclass(slots=True)
class Lines:
    """A build's outermost phases as events."""

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
class Progression:
    """What is told of several builds one after another."""

    monitor: Callable[[str], Cancellable]  # of the build of one precision
    tell: Callable[[dict[str, Any]], None]


@contextmanager
def bars(console: Console) -> Iterator[Progression]:
    """Bars while a build runs; the events are left to the table at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)

    def monitor(_: str) -> Cancellable:
        progress.start()
        return Bars(progress)

    try:
        yield Progression(monitor, lambda _: None)
    finally:
        progress.stop()


@contextmanager
def lines() -> Iterator[Progression]:
    """One JSON object a line on stdout."""

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    yield Progression(lambda precision: Lines(precision, tell), tell)


@contextmanager
def interruptible(monitor: Cancellable) -> Iterator[None]:
    """Ctrl-C and SIGTERM cancel the build instead of raising inside TensorRT, where the exception would be swallowed."""

    def on_interrupt(_: int, __: FrameType | None) -> None:
        monitor.cancel()

    previous = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
