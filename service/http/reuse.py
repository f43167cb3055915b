"""The same request again: its images are taken from an equal job that is done, or awaited from one that runs.

Two jobs are equal where their pictures are: the digest holds the bundle, and every field of a job but those
named here as bookkeeping, so that a field that is added changes it unless somebody says otherwise. A seed
is part of it, so requests without one are not equal to any.

A job that is done answers only if it was drawn as it was admitted: the digest says the operating point, and a
job may have left it under way. To wait for one that runs, a request must lose nothing by that:

| of the job that runs | why |
|---|---|
| it is due no later, or neither is due | a request is not late because of another |
| it may not be degraded, or consents to the same | its rung may still be moved |
| it has no lower priority | a request does not queue behind its rank |
| its previews come as often, where they are asked for | they are drawn for all who wait |

Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from ditserve.service.errors import ServiceError
from ditserve.service.jobs import WEIGHTS, EqualJobs, Job, JobResult
from ditserve.service.queue.broker import Overtaken
from ditserve.service.queue.queue_client import Queue
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics
from ditserve.service.wire import fields_of, pack

# From which jobs a request may be answered: none, the caller's own that are done, or those that run as well.
Sharing = Literal["none", "done", "running"]
# The way in which a request was answered while reuse is on.
CacheOutcome = Literal["hit", "joined", "miss"]

# How often a place among equal jobs is looked at again that another job took meanwhile.
OVERTAKEN_TRIES: Final = 3
# The fields of a job that its pictures do not depend on. `caller` is one only where callers share.
BOOKKEEPING: Final = frozenset(
    {
        "id",
        "previews",
        "priority",
        "created_at",
        "deadline_at",
        "allow_degraded",
        "min_steps",
        "min_quality",
        "rung",
        "reason",
        "cost_rows",
        "floor_rows",
        "trace",
        "callback_url",
    }
)


@dataclass(frozen=True, slots=True)
class SharedJob:
    """An equal job, and its result if that is stored; else it was joined under the name `holder`."""

    job: Job
    result: JobResult | None
    holder: str

    @property
    def outcome(self) -> CacheOutcome:
        return "joined" if self.result is None else "hit"


class Reuse:
    """Looks for jobs equal to those of one version of a model, whose bundle has this digest."""

    def __init__(self, queue: Queue, bundle: str, settings: Settings) -> None:
        self._queue, self._bundle = queue, bundle
        self._keep_s, self._across = settings.reuse_s, settings.reuse_across_keys

    @property
    def on(self) -> bool:
        return self._keep_s > 0

    def lookup(self, sharing: Sharing, *, seeded: bool) -> Lookup:
        """Return the lookup of one request, which may or may not have a seed."""
        return Lookup(self, sharing, seeded=seeded)

    async def find(self, job: Job, sharing: Sharing) -> SharedJob | EqualJobs:
        """Return an equal job that can answer, or else the place at which this job is to be found.

        Raises `QueueUnavailable`.
        """
        digest = picture_digest(job, self._bundle, across=self._across)
        seen = await self._queue.equal_job(digest)
        return await self._shared(seen, job, sharing) or EqualJobs(digest, seen, self._keep_s)

    async def _shared(self, job_id: str, mine: Job, sharing: Sharing) -> SharedJob | None:
        """Return an equal job that can answer. A fault of its record, or of Redis, is that it cannot."""
        with suppress(ServiceError):
            status = await self._queue.status(job_id) if job_id and sharing != "none" else None
            if status is None or (sharing == "done" and status.job.caller != mine.caller):
                return None
            theirs = status.job
            if status.state == "done":
                result = await self._queue.result(job_id)
                if result is not None and self._as_admitted(theirs, result):
                    return SharedJob(theirs, result, "")
            elif sharing == "running" and loses_nothing(mine, theirs):
                holder = secrets.token_hex(8)
                if await self._queue.join(job_id, holder):
                    return SharedJob(theirs, None, holder)
        return None

    def _as_admitted(self, job: Job, result: JobResult) -> bool:
        """Return whether images were drawn with this bundle, and at the operating point of the digest.

        One that says it was not degraded was drawn as asked, because it says so whenever it is moved.
        """
        admitted = job.admitted
        if admitted is None or result.bundle != self._bundle:
            return False
        if job.rung is None:
            return not result.degraded
        return result.degraded and (result.rung, result.steps_used) == (admitted.name, admitted.walked)


class Lookup:
    """Looks for a job that answers one request, or for the place where its own job is found by others.

    It is `active` if reuse is on, and the request has a seed.
    """

    def __init__(self, reuse: Reuse, sharing: Sharing, *, seeded: bool) -> None:
        self._reuse, self._sharing = reuse, sharing
        self.active = seeded and reuse.on
        self._place: EqualJobs | None = None

    async def find(self, job: Job) -> SharedJob | None:
        """Return a job equal to this one that can answer, None if there is none."""
        if not self.active:
            return None
        found = await self._reuse.find(job, self._sharing)
        if isinstance(found, SharedJob):
            metrics.REUSE.labels(found.outcome).inc()
            return found
        self._place = found
        return None

    async def queue(
        self, job: Job, enqueue: Callable[[EqualJobs | None], Awaitable[bool]]
    ) -> SharedJob | bool:
        """Return what `enqueue` returns for the place found last, or a job that took it meanwhile."""
        for _ in range(OVERTAKEN_TRIES):
            try:
                return await enqueue(self._place)
            except Overtaken:
                shared = await self.find(job)
                if shared is not None:
                    return shared
        return await enqueue(None)

    def missed(self) -> CacheOutcome | None:
        """Count that the request's own job was queued. Return the outcome, None where nothing is reused."""
        if not self._reuse.on:
            return None
        metrics.REUSE.labels("miss").inc()
        return "miss"


def loses_nothing(mine: Job, theirs: Job) -> bool:
    """Return whether a request can wait for the images of an equal job that runs. See the table above."""
    if mine.deadline_at is None or theirs.deadline_at is None:
        in_time = mine.deadline_at == theirs.deadline_at
    else:
        in_time = theirs.deadline_at <= mine.deadline_at
    same_consent = mine.allow_degraded and mine.consent == theirs.consent
    return (
        in_time
        and (same_consent or not theirs.allow_degraded)
        and WEIGHTS[theirs.priority] >= WEIGHTS[mine.priority]
        and mine.previews in (0, theirs.previews)
    )


def picture_digest(job: Job, bundle: str, *, across: bool) -> str:
    """Return a digest that jobs share whose pictures are the same; `across` callers, or only of one."""
    left_out = BOOKKEEPING | {"caller"} if across else BOOKKEEPING
    fields = {name: value for name, value in fields_of(job).items() if name not in left_out}
    return hashlib.blake2b(pack({"bundle": bundle, **fields}), digest_size=16).hexdigest()
