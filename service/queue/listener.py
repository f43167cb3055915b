"""One subscription per process, many waiting requests.

A wait registers the job, the subscription stands, the job's outcome is read, and from then on each `ended`
message makes it be read again. After a lost connection every outcome that is waited for is read again.
Nothing polls.

A job that was queued this moment is not read before its message comes, or `SAFETY_READ_S` later without one.
While a read is under way, jobs become due; the next read takes them all at once, so that a busy process reads
less often.

The phases of a job that is waited for, and what moves it (`TRANSITIONS`):

    registered ──wanted──► due ──taken──► reading ──answered──► settled
         ▲                  ▲──wanted, unread──┤
         └──────────────not ended──────────────┘
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from ditserve.service.errors import InternalError, QueueUnavailable, ServiceError
from ditserve.service.jobs import JobResult
from ditserve.service.queue.broker import Broker

RETRY_S = 0.2
SAFETY_READ_S = 0.5  # a new job is read after so long, should its message have been lost
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
        handlers = {broker.keys.ended_channel: self._on_ended}
        self._subscriber = broker.subscribe(handlers, connected=self._on_connected)

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

        Waits through outages of Redis; the caller sets the limit (`asyncio.timeout`).

        Raises:
            ServiceError: the job's own error, `JobNotFound` or `JobExpired`.
        """
        loop = asyncio.get_running_loop()
        awaited = self._awaited.get(job_id)
        if awaited is None:
            awaited = self._awaited[job_id] = _Awaited(loop.create_future())
        awaited.waiters += 1
        safety: asyncio.TimerHandle | None = None
        try:
            if new and self.live and job_id not in self._early_ends:
                safety = loop.call_later(SAFETY_READ_S, self._want, job_id)
            else:
                await self._subscriber.wait_live()
                self._want(job_id)
            return await asyncio.shield(awaited.outcome)
        finally:
            if safety is not None:
                safety.cancel()
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

    def _on_connected(self) -> None:
        for job_id in self._awaited:
            self._want(job_id)

    def _want(self, job_id: str) -> None:
        """Let the job's outcome be read by the next read."""
        awaited = self._awaited.get(job_id)
        if awaited is not None and awaited.move("wanted"):
            self._due.append(job_id)
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Read outcomes until none is due, however often Redis has to be asked."""
        try:
            while batch := self._take_due():
                try:
                    outcomes = await self._broker.outcomes(list(batch))
                except QueueUnavailable:
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
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        for awaited in self._awaited.values():
            awaited.outcome.cancel()
