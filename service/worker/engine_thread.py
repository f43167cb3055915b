"""The thread that steps the engine. No other thread touches the engine.

The event loop sends commands (add, cancel, export); the thread applies them between two steps and delivers
reports. It reports at once when a step ended or showed something, and otherwise a few times a second.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from ditserve.service.engine.samples import Failed, SampleRequest, StepReport
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import InternalError, ServiceError
from ditserve.service.fleet import DemandBucket, SlowSpell
from ditserve.service.planning.costs import CostModel
from ditserve.service.queue.clock import QueueClock
from ditserve.service.telemetry.faults import surviving

# A sample to run, and the snapshot to run it from if it has begun elsewhere.
Start = tuple[SampleRequest, Snapshot | None]

REPORT_EVERY_S = 0.1
# An idle engine that was slow when it last ran measures its pace so often, in this share of the time at most.
MEASURE_EVERY_S, MEASURE_SHARE = 1.0, 0.02
FAULTS_ALLOWED = 3  # steps in a row that raise before the engine counts as broken

log = structlog.get_logger()


def _stop() -> None:
    """The command that ends the thread."""


class ProcessorWaits(threading.local):
    """The seconds for which a thread, ready to run, has ever waited for a processor, as Linux counts them.

    Zero where it does not.
    """

    def __init__(self) -> None:
        # Runs in each thread that asks, because the file is that of the thread which opens it. It stays open:
        # the threads that ask live as long as the process.
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = None

    def __call__(self) -> float:
        if self._file is None:
            return 0.0
        _, waited_ns, _ = os.pread(self._file, 100, 0).split()
        return int(waited_ns) / 1e9


class Stepper(Protocol):
    """The part of the engine that is used here."""

    costs: CostModel
    step_s: float

    @property
    def idle(self) -> bool: ...
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
    def measure_idle(self, idle_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The cost model at one moment: seconds of a step and of a decode.

    `saturation_rows` is the batch size beyond which a further row gains nothing, and the step is as there.
    `slow` says how much slower it may be for a while.
    """

    fixed_s: float
    per_row_s: float
    decode_s: float
    saturation_rows: int
    slow: tuple[SlowSpell, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The state of the engine after a step, and what became of samples since the last report."""

    step: StepReport
    refused: tuple[Failed, ...]  # samples that could not join
    crashed: tuple[Failed, ...]  # samples that were running when a step raised
    progress: Mapping[str, tuple[int, int]]  # sample id → steps taken, steps in all
    backlog_rows: int
    demand: tuple[DemandBucket, ...]  # the backlog by deadline
    stepped_at: float  # by the monotonic clock
    costs: StepCosts


class EngineThread:
    """Owner of the engine and of its thread.

    Args:
        deliver: called in the engine's thread with every report; must return at once.
        observe: called in the engine's thread with the report of every step.
        on_broken: called once, in the engine's thread, when the engine keeps raising; the thread then ends.
        clock: that of the deadlines of jobs. The engine's own is the monotonic one, to which deadlines are
            turned here: the time that a sample has left does not change when a clock is set.
    """

    def __init__(
        self,
        engine: Stepper,
        *,
        deliver: Callable[[EngineReport], object],
        observe: Callable[[StepReport], None],
        on_broken: Callable[[], object],
        clock: QueueClock,
        max_rows: int,
    ) -> None:
        self.queued_rows = 0  # this worker's share of the rows that wait in the queue
        self._engine, self._max_rows = engine, max_rows
        self._deliver, self._observe, self._on_broken = deliver, observe, on_broken
        self._clock = clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._refused: list[Failed] = []
        self._crashed: list[Failed] = []
        self._reported_at = 0.0
        self._stepped_at = time.monotonic()
        self._faults = 0
        self._changed = True  # since the last report
        self._thread = threading.Thread(target=self._run_watched, name="engine", daemon=True)

    @property
    def step_s(self) -> float:
        """Return the predicted seconds of the step under way, or else of the last."""
        return self._engine.step_s

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Let the current step be the last. Return False if the thread does not end in time."""
        self._commands.put(_stop)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def add(self, starts: Sequence[Start]) -> None:
        """Let all samples of a job join, or none of them: then the next report lists each as refused."""
        local = [(self._in_local_time(request), snapshot) for request, snapshot in starts]
        self._commands.put(lambda: self._add(local))

    def export(self, sample_ids: Iterable[str]) -> Future[dict[str, Snapshot]]:
        """Return, in time, snapshots of samples as they are between two steps.

        Samples not begun are left out.
        """
        ids, exported = tuple(sample_ids), Future[dict[str, Snapshot]]()
        self._commands.put(lambda: self._export(ids, exported))
        return exported

    def cancel(self, sample_ids: Iterable[str]) -> None:
        ids = tuple(sample_ids)
        self._commands.put(lambda: self._cancel(ids))

    def observe_decode(self, seconds: float) -> None:
        """Teach the cost model how long the decoding of an image took."""
        self._commands.put(lambda: self._engine.costs.observe_decode(seconds))

    def _in_local_time(self, request: SampleRequest) -> SampleRequest:
        if request.deadline_at is None:
            return request
        return replace(request, deadline_at=self._clock.local(request.deadline_at))

    def _run_watched(self) -> None:
        """Run until told to stop. Without this thread a worker would hold its jobs for ever, idly."""
        with surviving("engine thread"):
            return self._run()
        self._on_broken()

    def _run(self) -> None:
        while True:
            command = self._next_command()
            if command is _stop:
                return
            if command is not None:
                # A command is about one job; the others need this thread.
                with surviving("engine command"):
                    command()
                self._changed = True
            elif not self._step():
                self._on_broken()
                return

    def _next_command(self) -> Callable[[], None] | None:
        """Return the next command, or None if it is time for a step.

        Wait for a command while the engine is idle.
        """
        with suppress(queue.Empty):
            return self._commands.get_nowait()
        if not self._engine.idle:
            return None
        if self._changed:
            self._report(StepReport())
        costs = self._engine.costs
        while costs.slowed:
            pause_s = max(MEASURE_EVERY_S, costs.predict(1) / MEASURE_SHARE)
            with suppress(queue.Empty):
                return self._commands.get(timeout=pause_s)
            self._engine.measure_idle(pause_s)
            self._report(StepReport())
        return self._commands.get()

    def _step(self) -> bool:
        """Take one step. Return False when the engine has raised too often in a row."""
        try:
            report = self._engine.step(self.queued_rows)
        except Exception as error:
            fault = InternalError("A step of the engine failed.", extra={"exception": type(error).__name__})
            self._crashed += [Failed(sample_id, fault) for sample_id in self._engine.hand_back()]
            self._faults += 1
            self._report(StepReport())
            log.exception("step failed", faults=self._faults)
            return self._faults < FAULTS_ALLOWED
        self._faults = 0
        self._stepped_at = time.monotonic()
        with surviving("observing a step"):
            self._observe(report)
        news = report.finished or report.failed or report.previews or report.changes or self._refused
        if news or time.monotonic() - self._reported_at >= REPORT_EVERY_S:
            self._report(report)
        return True

    def _add(self, starts: Sequence[Start]) -> None:
        if self._engine.idle:
            # An idle engine takes no steps; that must not look as if it hung.
            self._stepped_at = time.monotonic()
        for added, (request, snapshot) in enumerate(starts):
            try:
                self._join(request, snapshot)
            except Exception as error:
                if not isinstance(error, ServiceError):
                    log.exception("sample refused", sample=request.id)
                    error = InternalError("The engine cannot take this job.")
                ids = tuple(request.id for request, _ in starts)
                self._cancel(ids[:added])
                self._refused += [Failed(sample_id, error) for sample_id in ids]
                return

    def _join(self, request: SampleRequest, snapshot: Snapshot | None) -> None:
        """Let a sample join; one whose snapshot the engine cannot take starts anew."""
        try:
            self._engine.add(request, snapshot)
        except ValueError as error:
            if snapshot is None:
                raise
            log.info("snapshot dropped", sample=request.id, reason=str(error))
            self._engine.add(request)

    def _export(self, ids: tuple[str, ...], exported: Future[dict[str, Snapshot]]) -> None:
        if not exported.set_running_or_notify_cancel():
            return
        snapshots = {sample_id: self._engine.export(sample_id) for sample_id in ids}
        exported.set_result({sample_id: snapshot for sample_id, snapshot in snapshots.items() if snapshot})

    def _cancel(self, ids: tuple[str, ...]) -> None:
        for sample_id in ids:
            self._engine.cancel(sample_id)

    def _report(self, step: StepReport) -> None:
        engine, costs = self._engine, self._engine.costs
        saturation_rows = costs.saturation_rows(self._max_rows)
        report = EngineReport(
            step=step,
            refused=tuple(self._refused),
            crashed=tuple(self._crashed),
            progress=engine.progress(),
            backlog_rows=engine.backlog_rows,
            demand=tuple(replace(bucket, at=self._clock.shared(bucket.at)) for bucket in engine.demand()),
            stepped_at=self._stepped_at,
            costs=StepCosts(
                *costs.line(saturation_rows),
                costs.decode_s,
                saturation_rows,
                costs.slow_spells(),
            ),
        )
        self._refused.clear()
        self._crashed.clear()
        self._changed, self._reported_at = False, time.monotonic()
        self._deliver(report)
