"""What is written about a job, read back: status, result, outcome, dead letters. Reads only."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from redis.asyncio import Redis

from service.errors import JobExpired, JobNotFound, from_wire
from service.jobs import Job, JobResult, JobStatus, State, unpack
from service.queue.connection import reaching
from service.queue.keys import Keys

_FIELDS = ("wire", "state", "attempt", "step", "steps", "error", "owner")


class Records:
    def __init__(self, client: Redis, keys: Keys, *, timeout_s: float) -> None:
        self._client, self._keys, self._timeout_s = client, keys, timeout_s

    async def status(self, job_id: str) -> JobStatus | None:
        async with reaching(self._timeout_s):
            pipeline = self._client.pipeline(transaction=True)
            pipeline.hmget(self._keys.job(job_id), _FIELDS)
            pipeline.zrank(self._keys.queue, job_id)
            fields, position = await pipeline.execute()
        wire, state, attempt, step, steps, error, owner = fields
        if wire is None:
            return None
        job = Job.from_bytes(wire)
        return JobStatus(
            id=job_id,
            state=cast(State, state.decode()),
            position=position,
            attempt=int(attempt),
            step=int(step),
            steps=job.steps if steps is None else int(steps),
            created_at=job.created_at,
            error=None if error is None else _read_error(error, owner),
            job=job,
        )

    async def result(self, job_id: str) -> JobResult | None:
        async with reaching(self._timeout_s):
            data: Any = await self._client.get(self._keys.result(job_id))
        return None if data is None else JobResult.from_bytes(data)

    async def outcome(self, job_id: str) -> JobResult | None:
        async with reaching(self._timeout_s):
            pipeline = self._client.pipeline(transaction=True)
            pipeline.hmget(self._keys.job(job_id), ("state", "error", "owner"))
            pipeline.get(self._keys.result(job_id))
            (state, error, owner), data = await pipeline.execute()
        if data is not None:
            return JobResult.from_bytes(data)
        if state is None:
            raise JobNotFound(f"There is no job {job_id}.")
        if state == b"done":
            raise JobExpired(f"The images of job {job_id} are no longer kept.")
        if state in (b"failed", b"dead", b"cancelled"):
            raise from_wire(_read_error(error, owner))
        return None

    async def dead(self) -> list[JobStatus]:
        async with reaching(self._timeout_s):
            ids: Any = await self._client.zrange(self._keys.dead, 0, -1)
        statuses = await asyncio.gather(*(self.status(job_id.decode()) for job_id in ids))
        return [status for status in statuses if status is not None and status.state == "dead"]


def _read_error(data: bytes, owner: bytes | None) -> dict[str, Any]:
    """The error of a job, with the worker that ran it last."""
    error = unpack(data)
    if owner is not None:
        error["extra"] = {**error.get("extra", {}), "worker": owner.decode()}
    return error
