"""Jobs that nobody waits for are cancelled, at once or as soon as Redis can be used again. Knows no HTTP."""

import asyncio

from ditserve.service.errors import QueueUnavailable
from ditserve.service.queue.queue_client import Queue

PATIENCE_S = 0.5  # for which whoever abandons a job waits until it is cancelled
PAUSE_S = 1.0  # between two tries
KEPT = 4096  # jobs to be cancelled; those that have waited longest are left to run, which does no harm


class Abandoned:
    """The jobs of one queue that are still to be cancelled; one task cancels them in order."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._denials: dict[tuple[str, str], int] = {}  # by job and holder
        self._cancelling: asyncio.Task[None] | None = None

    async def cancel(self, job_id: str, *, holder: str = "") -> None:
        """Cancel a job. Return once that is done, or after `PATIENCE_S` seconds while it is tried again.

        With the `holder` under which a request joined the job, that request alone leaves it.
        """
        self.add(job_id, holder=holder)
        if self._cancelling is not None:
            await asyncio.wait([self._cancelling], timeout=PATIENCE_S)

    def add(self, job_id: str, *, holder: str = "", denials: int = 1) -> None:
        """Have a job cancelled.

        Redis must say `denials` times, with pauses, that there is nothing to cancel before that is believed.
        """
        self._denials[job_id, holder] = denials
        if len(self._denials) > KEPT:
            del self._denials[next(iter(self._denials))]
        if self._cancelling is None:
            self._cancelling = asyncio.create_task(self._cancel_all())

    async def _cancel_all(self) -> None:
        try:
            while self._denials:
                (job_id, holder), denials = next(iter(self._denials.items()))
                try:
                    cancelled = await self._queue.cancel(job_id, holder=holder)
                except QueueUnavailable:
                    await asyncio.sleep(PAUSE_S)
                    continue
                self._denials.pop((job_id, holder), None)
                if not cancelled and denials > 1:
                    asyncio.get_running_loop().call_later(PAUSE_S, self._again, job_id, denials - 1)
        finally:
            self._cancelling = None

    def _again(self, job_id: str, denials: int) -> None:
        self.add(job_id, denials=denials)

    async def aclose(self) -> None:
        """Give what is still to be cancelled a moment, and leave the rest."""
        if self._cancelling is not None:
            await asyncio.wait([self._cancelling], timeout=PATIENCE_S)
        if self._cancelling is not None:
            self._cancelling.cancel()
