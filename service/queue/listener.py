"""One subscription per process, many waiting requests.

A wait registers the job, its outcome is read, and from then on each `ended` message makes it be read again. A
job that was queued this moment is not read before its message comes. While a read is under way, jobs become
due; the next read takes them all at once, so that a busy process reads less often.

A message is a hint that may be lost, and a job may be lost whose message then never comes. So every outcome
that is waited for is read again after every (re)connection, and about every `REREAD_S` seconds.

The phases of a job that is waited for, and what moves it (`TRANSITIONS`):

    registered ──wanted──► due ──taken──► reading ──answered──► settled
         ▲                  ▲──wanted, unread──┤
         └──────────────not ended──────────────┘
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from ditserve.service.errors import InternalError, QueueUnavailable, ServiceError
from ditserve.service.jobs import JobResult
from ditserve.service.queue.broker import Broker

RETRY_S = 0.2
REREAD_S = 2.0  # between two reads of all that is waited for, on average
EARLY_ENDS_KEPT = 1024  # jobs remembered that ended before anybody waited for them
READ_AT_ONCE = 64  # jobs, whose images all come into memory

Phase = Literal["registered", "due", "reading", "settled"]
Cause = Literal["wanted", "taken", "unread", "not ended", "answered"]

# What happens to a job leads from a phase to the next; where nothing is listed the phase stays. A message
# that comes during the read of its job makes it due once more, because the read may have been earlier than
# the end of the job.
TRANSITIONS: Final[Mapping[tuple[Phase, Cause], Phase]] = {
    ("registered", "wanted"): "due",
    ("reading", "wanted"): "due",
    ("due", "taken"): "reading",
    ("reading", "unread"): "due",
    ("reading", "not ended"): "registered",
    ("reading", "answered"): "settled",
    ("due", "answered"): "settled",
}

log = structlog.get_logger()


@dataclass(slots=True)
class _Awaited:
    """A job that is waited for."""

    outcome: asyncio.Future[JobResult]
    waiters: int = 0
    phase: Phase = "registered"

    def move(self, cause: Cause) -> bool:
        """Move on to the next phase. Return False if the phase stays."""
        before = self.phase
        self.phase = TRANSITIONS.get((before, cause), before)
        return self.phase != before

    def settle(self, answer: JobResult | ServiceError) -> None:
        self.move("answered")
        if self.outcome.done():
            return
        if isinstance(answer, ServiceError):
            self.outcome.set_exception(answer)
        else:
            self.outcome.set_result(answer)


class Listener:
    """Waits for the outcomes of jobs. Create it inside the event loop; close it with `aclose`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._awaited: dict[str, _Awaited] = {}
        self._due: deque[str] = deque()
        self._early_ends: dict[str, None] = {}  # in order
        self._reading: asyncio.Task[None] | None = None
        self._rereading = asyncio.create_task(self._reread())
        handlers = {broker.keys.ended_channel: self._on_ended}
        self._subscriber = broker.subscribe(handlers, connected=self._want_all)

    @property
    def live(self) -> bool:
        """Return whether the subscription stands at this moment."""
        return self._subscriber.live

    @property
    def waiting(self) -> int:
        """Return how many jobs are waited for."""
        return len(self._awaited)

    async def wait(self, job_id: str, *, new: bool = False) -> JobResult:
        """Return the job's result once it has one. `new`: the job was queued this moment.

        Waits through outages of Redis of up to `outage_s` of the broker; the caller sets the limit
        (`asyncio.timeout`).

        Raises:
            ServiceError: the job's own error, `JobLost`, `JobExpired` or `QueueUnavailable`.
        """
        awaited = self._awaited.get(job_id)
        if awaited is None:
            awaited = self._awaited[job_id] = _Awaited(asyncio.get_running_loop().create_future())
        awaited.waiters += 1
        try:
            if not (new and self.live and job_id not in self._early_ends):
                self._want(job_id)
            return await asyncio.shield(awaited.outcome)
        finally:
            awaited.waiters -= 1
            if not awaited.waiters and self._awaited.get(job_id) is awaited:
                del self._awaited[job_id]

    def _on_ended(self, job_id: str) -> None:
        if job_id in self._awaited:
            self._want(job_id)
            return
        self._early_ends[job_id] = None
        if len(self._early_ends) > EARLY_ENDS_KEPT:
            del self._early_ends[next(iter(self._early_ends))]

    def _want_all(self) -> None:
        for job_id in self._awaited:
            self._want(job_id)

    async def _reread(self) -> None:
        """Read all that is waited for again and again, not in step with other processes."""
        while True:
            await asyncio.sleep(REREAD_S * random.uniform(0.75, 1.25))
            self._want_all()

    def _want(self, job_id: str) -> None:
        """Let the job's outcome be read by the next read."""
        awaited = self._awaited.get(job_id)
        if awaited is not None and awaited.move("wanted"):
            self._due.append(job_id)
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Read outcomes until none is due, however often Redis has to be asked."""
        clock = asyncio.get_running_loop().time
        answered_at = clock()
        outcomes: Sequence[JobResult | ServiceError | None]
        try:
            while batch := self._take_due():
                try:
                    outcomes = await self._broker.outcomes(list(batch))
                    answered_at = clock()
                except QueueUnavailable as error:
                    if clock() - answered_at > self._broker.outage_s:
                        outcomes = [error] * len(batch)
                    else:
                        unread = [job_id for job_id, awaited in batch.items() if awaited.move("unread")]
                        self._due.extendleft(reversed(unread))
                        await asyncio.sleep(RETRY_S)
                        continue
                except Exception:
                    # A waiter must not hang because of a fault of this code.
                    log.exception("reading outcomes failed", jobs=list(batch))
                    fault = InternalError("The outcome of the job could not be read.")
                    outcomes = [fault] * len(batch)
                for awaited, outcome in zip(batch.values(), outcomes, strict=True):
                    if outcome is None:
                        awaited.move("not ended")
                    elif awaited.waiters:
                        awaited.settle(outcome)
        finally:
            self._reading = None

    def _take_due(self) -> dict[str, _Awaited]:
        """Return the jobs to read now: at most `READ_AT_ONCE`, and only those that are still waited for."""
        batch: dict[str, _Awaited] = {}
        while self._due and len(batch) < READ_AT_ONCE:
            job_id = self._due.popleft()
            awaited = self._awaited.get(job_id)
            if awaited is not None and awaited.move("taken"):
                batch[job_id] = awaited
        return batch

    async def aclose(self) -> None:
        await self._subscriber.aclose()
        tasks = [task for task in (self._rereading, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for awaited in self._awaited.values():
            awaited.outcome.cancel()
