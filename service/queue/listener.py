"""One subscription per process, many waiting requests.

A waiter registers, the subscription stands, the job's state is read, and from then on each `ended` message
makes that job's state be read again. After a lost connection every waiter's state is re-read. Nothing polls.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from service.errors import InternalError, QueueUnavailable, ServiceError
from service.jobs import JobResult
from service.queue.broker import Broker

RETRY_S = 0.2
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
        self._reads: set[asyncio.Task[None]] = set()
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

    async def wait(self, job_id: str) -> JobResult:
        """The job's result, once it has one; raises the job's own error, `JobNotFound` or `JobExpired`.

        Waits through Redis outages; the caller sets the limit (`asyncio.timeout`).
        """
        waiting = self._waiting.get(job_id)
        if waiting is None:
            waiting = self._waiting[job_id] = _Waiting(asyncio.get_running_loop().create_future())
        waiting.waiters += 1
        try:
            await self._subscriber.wait_live()
            self._look(job_id)
            return await asyncio.shield(waiting.outcome)
        finally:
            waiting.waiters -= 1
            if not waiting.waiters and self._waiting.get(job_id) is waiting:
                del self._waiting[job_id]

    def _ended(self, job_id: str) -> None:
        if job_id in self._waiting:
            self._look(job_id)

    def _reread(self) -> None:
        for job_id in self._waiting:
            self._look(job_id)

    def _look(self, job_id: str) -> None:
        task = asyncio.create_task(self._read(job_id, self._waiting[job_id]))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)

    async def _read(self, job_id: str, waiting: _Waiting) -> None:
        """Read the job's outcome, however often Redis has to be asked; a job that has not ended stays waited
        for.
        """
        while waiting.waiters and not waiting.outcome.done():
            try:
                result = await self._broker.outcome(job_id)
            except QueueUnavailable:
                await asyncio.sleep(RETRY_S)
                continue
            except ServiceError as error:
                _settle(waiting.outcome, error)
                return
            except Exception:  # a waiter must never hang on a mistake of ours
                log.exception("reading an outcome failed", job=job_id)
                _settle(waiting.outcome, InternalError("The outcome of the job could not be read."))
                return
            if result is not None:
                _settle(waiting.outcome, result)
            return

    async def aclose(self) -> None:
        await self._subscriber.aclose()
        for task in self._reads:
            task.cancel()
        await asyncio.gather(*self._reads, return_exceptions=True)
        for waiting in self._waiting.values():
            waiting.outcome.cancel()


def _settle(outcome: asyncio.Future[JobResult], answer: JobResult | ServiceError) -> None:
    if outcome.done():
        return
    if isinstance(answer, ServiceError):
        outcome.set_exception(answer)
    else:
        outcome.set_result(answer)
