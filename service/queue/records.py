"""What is written about a job, read back: status, result, outcome, dead letters. Reads only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis

from ditserve.service.errors import InternalError, JobExpired, JobNotFound, ServiceError, from_wire
from ditserve.service.jobs import Job, JobResult, JobStatus, State
from ditserve.service.queue.connection import reaching
from ditserve.service.queue.keys import Keys
from ditserve.service.wire import WireError, unpack

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
        (found,) = await self.outcomes([job_id])
        if isinstance(found, ServiceError):
            raise found
        return found

    async def outcomes(self, job_ids: Sequence[str]) -> list[JobResult | ServiceError | None]:
        async with reaching(self._timeout_s):
            # No transaction: a job's result is written together with its state, so the state, read first, is never ahead of it.
            pipeline = self._client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hmget(self._keys.job(job_id), ("state", "error", "owner"))
                pipeline.get(self._keys.result(job_id))
            replies: list[Any] = await pipeline.execute()
        return [
            _read_outcome(job_id, data, *fields)
            for job_id, fields, data in zip(job_ids, replies[::2], replies[1::2], strict=True)
        ]

    async def dead(self) -> list[JobStatus]:
        async with reaching(self._timeout_s):
            ids: Any = await self._client.zrange(self._keys.dead, 0, -1)
        statuses = await asyncio.gather(*(self.status(job_id.decode()) for job_id in ids))
        return [status for status in statuses if status is not None and status.state == "dead"]


def _read_outcome(
    job_id: str, data: bytes | None, state: bytes | None, error: bytes | None, owner: bytes | None
) -> JobResult | ServiceError | None:
    try:
        if data is not None:
            return JobResult.from_bytes(data)
        if state in (b"failed", b"dead", b"cancelled"):
            return from_wire(_read_error(error or b"", owner))
    except WireError as fault:
        return InternalError(f"The outcome of the job cannot be read: {fault}.")
    if state is None:
        return JobNotFound(f"There is no job {job_id}.")
    if state == b"done":
        return JobExpired(f"The images of job {job_id} are no longer kept.")
    return None


def _read_error(data: bytes, owner: bytes | None) -> dict[str, Any]:
    """The error of a job, with the worker that ran it last."""
    error = unpack(data)
    if owner is not None:
        error["extra"] = {**error.get("extra", {}), "worker": owner.decode()}
    return error
