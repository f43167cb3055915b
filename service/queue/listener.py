"""One subscription per process, many waiting requests.

A waiter registers, the subscription stands, the job's state is read, and from then on each `ended` message
makes that job's state be read again. After a lost connection every waiter's state is re-read. Nothing polls. A job that
was queued this moment is not read before its message, unless that stays away.
What is to be read while a read is under way is read by the next one, all at once, so that a busy process reads less often.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from ditserve.service.errors import InternalError, QueueUnavailable, ServiceError
from ditserve.service.jobs import JobResult
from ditserve.service.queue.broker import Broker

RETRY_S = 0.2
LATER_S = 0.5  # after which a new job is read all the same
UNAWAITED = 1024  # jobs remembered that ended before anybody waited for them
READ_AT_ONCE = 64  # jobs, whose images all come into memory
log = structlog.get_logger()


@dataclass(slots=True)
class _Waiting:
    outcome: asyncio.Future[JobResult]
    waiters: int = 0


class Listener:
    """Resolves the outcome of jobs. Create it inside the event loop; close it with `aclose`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: dict[str, _Waiting] = {}
        self._unread: dict[str, None] = {}  # in order
        self._unawaited: dict[str, None] = {}  # likewise
        self._reading: asyncio.Task[None] | None = None
        handlers = {broker.keys.ended_channel: self._ended}
        self._subscriber = broker.subscribe(handlers, connected=self._reread)

    @property
    def live(self) -> bool:
        """Whether the subscription stands at this moment."""
        return self._subscriber.live

    @property
    def waiting(self) -> int:
        """Jobs waited for."""
        return len(self._waiting)

    async def wait(self, job_id: str, *, new: bool = False) -> JobResult:
        """The job's result, once it has one; raises the job's own error, `JobNotFound` or `JobExpired`.

        Waits through Redis outages; the caller sets the limit (`asyncio.timeout`). `new`: it was queued this moment.
        """
        waiting = self._waiting.get(job_id)
        if waiting is None:
            waiting = self._waiting[job_id] = _Waiting(asyncio.get_running_loop().create_future())
        waiting.waiters += 1
        try:
            if not new or job_id in self._unawaited or not self.live:
                await self._subscriber.wait_live()
                self._look(job_id)
                return await asyncio.shield(waiting.outcome)
            later = asyncio.get_running_loop().call_later(LATER_S, self._look, job_id)
            try:
                return await asyncio.shield(waiting.outcome)
            finally:
                later.cancel()
        finally:
            waiting.waiters -= 1
            if not waiting.waiters and self._waiting.get(job_id) is waiting:
                del self._waiting[job_id]

    def _ended(self, job_id: str) -> None:
        if job_id in self._waiting:
            self._look(job_id)
            return
        self._unawaited[job_id] = None
        if len(self._unawaited) > UNAWAITED:
            del self._unawaited[next(iter(self._unawaited))]

    def _reread(self) -> None:
        for job_id in self._waiting:
            self._look(job_id)

    def _look(self, job_id: str) -> None:
        self._unread[job_id] = None
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Read outcomes until none is to be read, however often Redis has to be asked; a job that has not ended stays waited
        for.
        """
        try:
            while job_ids := self._next():
                try:
                    outcomes = await self._broker.outcomes(job_ids)
                except QueueUnavailable:
                    self._unread = dict.fromkeys((*job_ids, *self._unread))
                    await asyncio.sleep(RETRY_S)
                    continue
                except Exception:  # a waiter must never hang on a mistake of ours
                    log.exception("reading outcomes failed", jobs=job_ids)
                    fault = InternalError("The outcome of the job could not be read.")
                    outcomes = [fault] * len(job_ids)
                for job_id, outcome in zip(job_ids, outcomes, strict=True):
                    waiting = self._waiting.get(job_id)
                    if waiting is not None and outcome is not None:
                        _settle(waiting.outcome, outcome)
        finally:
            self._reading = None

    def _next(self) -> list[str]:
        """The jobs to read now: those still waited for."""
        chosen: list[str] = []
        while self._unread and len(chosen) < READ_AT_ONCE:
            job_id = next(iter(self._unread))
            del self._unread[job_id]
            waiting = self._waiting.get(job_id)
            if waiting is not None and not waiting.outcome.done():
                chosen.append(job_id)
        return chosen

    async def aclose(self) -> None:
        await self._subscriber.aclose()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        for waiting in self._waiting.values():
            waiting.outcome.cancel()


def _settle(outcome: asyncio.Future[JobResult], answer: JobResult | ServiceError) -> None:
    if outcome.done():
        return
    if isinstance(answer, ServiceError):
        outcome.set_exception(answer)
    else:
        outcome.set_result(answer)
