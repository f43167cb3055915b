"""The thread that drives the engine: it applies what the event loop asks for, takes steps, and says what came of them.

The engine is touched by this thread alone. The loop hears of a step as soon as it ended something or showed something, and
else a few times a second.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from ditserve.service.engine.samples import Failed, SampleRequest, StepReport
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import InternalError, ServiceError
from ditserve.service.jobs import DemandBucket
from ditserve.service.planning.costs import CostModel

Start = tuple[SampleRequest, Snapshot | None]  # a sample, and where it stands if it has begun elsewhere

BEAT_S = 0.1
FAULTS_ALLOWED = 3  # steps in a row that raise before the engine is taken for broken

log = structlog.get_logger()


def _stop() -> None:
    """The command that ends the thread."""


class Stepper(Protocol):
    """The part of the engine that is used here."""

    costs: CostModel

    @property
    def idle(self) -> bool: ...
    @property
    def running(self) -> int: ...
    @property
    def free_samples(self) -> int: ...
    @property
    def backlog_rows(self) -> int: ...
    def demand(self) -> tuple[DemandBucket, ...]: ...
    def add(self, request: SampleRequest, snapshot: Snapshot | None = None) -> None: ...
    def export(self, sample_id: str) -> Snapshot | None: ...
    def cancel(self, sample_id: str) -> None: ...
    def hand_back(self) -> tuple[str, ...]: ...
    def progress(self) -> dict[str, tuple[int, int]]: ...
    def step(self, queued_rows: int = 0) -> StepReport: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """The cost model at a moment: seconds of a step and of a decode, and the batch beyond which rows gain nothing."""

    fixed_s: float
    per_row_s: float
    decode_s: float
    saturation_rows: int


@dataclass(frozen=True, slots=True)
class Beat:
    """What the loop hears: the report of a step, what could not be run, and how the engine stands."""

    report: StepReport
    refused: tuple[Failed, ...]  # by the engine, at joining
    crashed: tuple[Failed, ...]  # all that was running when a step raised
    progress: Mapping[str, tuple[int, int]]
    backlog_rows: int
    demand: tuple[DemandBucket, ...]  # the backlog by deadline
    stepped_at: float
    pace: Pace


@dataclass(slots=True)
class _Told:
    """What a beat will say besides the report."""

    refused: list[Failed] = field(default_factory=list)
    crashed: list[Failed] = field(default_factory=list)


class Driver:
    """Owns the engine and its thread.

    Args:
        deliver: called in the engine's thread with every beat; must return at once.
        observe: called in the engine's thread with every report of a step.
        broken: called once, in the engine's thread, when the engine keeps raising; the thread then ends.
    """

    def __init__(
        self,
        engine: Stepper,
        *,
        deliver: Callable[[Beat], None],
        observe: Callable[[StepReport], None],
        broken: Callable[[], None],
        clock: Callable[[], float],
        max_rows: int,
    ) -> None:
        self.queued_rows = 0  # this worker's share of what waits in the queue
        self._engine, self._max_rows = engine, max_rows
        self._deliver, self._observe, self._broken, self._clock = deliver, observe, broken, clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._told = _Told()
        self._beat_at = 0.0
        self._stepped_at = clock()
        self._faults = 0
        self._changed = True  # since the last beat
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Let the current step be the last. False if it does not end in time."""
        self._commands.put(_stop)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def add(self, starts: Sequence[Start]) -> None:
        """Let all samples of a job join, or none: then each is refused in the next beat."""
        self._commands.put(lambda: self._add(starts))

    def export(self, sample_ids: Iterable[str]) -> Future[dict[str, Snapshot]]:
        """Where samples stand between two steps; what has not begun is left out. What they do later is not seen."""
        ids, exported = tuple(sample_ids), Future[dict[str, Snapshot]]()
        self._commands.put(lambda: self._export(ids, exported))
        return exported

    def cancel(self, sample_ids: Iterable[str]) -> None:
        ids = tuple(sample_ids)
        self._commands.put(lambda: self._cancel(ids))

    def observe_decode(self, seconds: float) -> None:
        """Teach the cost model what decoding an image took."""
        self._commands.put(lambda: self._engine.costs.observe_decode(seconds))

    def _pace(self) -> Pace:
        costs = self._engine.costs
        return Pace(costs.fixed_s, costs.per_row_s, costs.decode_s, costs.saturation_rows(self._max_rows))

    def _run(self) -> None:
        while True:
            command = self._next()
            if command is _stop:
                return
            if command is not None:
                command()
                self._changed = True
            elif not self._step():
                self._broken()
                return

    def _next(self) -> Callable[[], None] | None:
        """What the loop asked for, or None when it is time for a step; an idle engine waits here."""
        with suppress(queue.Empty):
            return self._commands.get_nowait()
        if not self._engine.idle:
            return None
        if self._changed:
            self._beat(StepReport())
        return self._commands.get()

    def _step(self) -> bool:
        """One step; False when the engine has raised too often in a row."""
        try:
            report = self._engine.step(self.queued_rows)
        except Exception as error:
            fault = InternalError("A step of the engine failed.", extra={"exception": type(error).__name__})
            self._told.crashed += [Failed(sample_id, fault) for sample_id in self._engine.hand_back()]
            self._faults += 1
            self._beat(StepReport())
            log.exception("step failed", faults=self._faults)
            return self._faults < FAULTS_ALLOWED
        self._faults = 0
        self._stepped_at = self._clock()
        self._observe(report)
        if report.finished or report.failed or report.previews or report.changes or self._beat_due():
            self._beat(report)
        return True

    def _add(self, starts: Sequence[Start]) -> None:
        if self._engine.idle:
            self._stepped_at = self._clock()  # it had nothing to do until now
        for done, (request, snapshot) in enumerate(starts):
            try:
                self._engine.add(request, snapshot)
            except Exception as error:
                if not isinstance(error, ServiceError):
                    log.exception("sample refused", sample=request.id)
                    error = InternalError("The engine cannot take this job.")
                self._cancel(tuple(each.id for each, _ in starts[:done]))
                self._told.refused += [Failed(each.id, error) for each, _ in starts]
                return

    def _export(self, ids: tuple[str, ...], exported: Future[dict[str, Snapshot]]) -> None:
        if exported.set_running_or_notify_cancel():  # somebody still waits for it
            snapshots = {sample_id: self._engine.export(sample_id) for sample_id in ids}
            exported.set_result({name: each for name, each in snapshots.items() if each is not None})

    def _cancel(self, ids: tuple[str, ...]) -> None:
        for sample_id in ids:
            self._engine.cancel(sample_id)

    def _beat_due(self) -> bool:
        return bool(self._told.refused) or self._clock() - self._beat_at >= BEAT_S

    def _beat(self, report: StepReport) -> None:
        engine, told = self._engine, self._told
        self._told, self._changed, self._beat_at = _Told(), False, self._clock()
        self._deliver(
            Beat(
                report=report,
                refused=tuple(told.refused),
                crashed=tuple(told.crashed),
                progress=engine.progress(),
                backlog_rows=engine.backlog_rows,
                demand=engine.demand(),
                stepped_at=self._stepped_at,
                pace=self._pace(),
            )
        )
