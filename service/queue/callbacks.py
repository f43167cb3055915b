"""The verbs of processes that call the senders of jobs back: take what is due, and note how it went.

A job that ends is put into an index in the script that ends it, so no end is missed. A process leases a
callback from there; one whose process dies is due again when its lease ends.
"""

from __future__ import annotations

from ditserve.service.jobs import CallbackState, DueCallback
from ditserve.service.queue.leases import LeaseVerbs, ms


class CallbackVerbs(LeaseVerbs):
    """The part of the broker that keeps callbacks until they are made."""

    async def due_callbacks(self, most: int, *, lease_s: float) -> list[DueCallback]:
        """Lease at most so many callbacks that are due, the longest due first."""
        due = await self._run("due_callbacks", ms(lease_s), most)
        return [DueCallback(job_id.decode(), number, ended_at / 1000) for job_id, number, ended_at in due]

    async def settle_callback(
        self, due: DueCallback, state: CallbackState, *, delay_s: float = 0.0, fault: str = ""
    ) -> bool:
        """Note how a leased callback went; a pending one is due again after `delay_s` seconds.

        Return False if the lease was lost.
        """
        token = due.job_id, due.number, ms(due.ended_at)
        return bool(await self._run("settle_callback", *token, state, ms(delay_s), fault))
