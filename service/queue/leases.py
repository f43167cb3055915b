"""The verbs of the owner of a lease: claim jobs, renew, publish progress, and finish, fail or hand back.

The callbacks of jobs that have ended are leased as well.

A lease carries a fencing token (owner, attempt): what a worker writes counts only while it holds the job.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import structlog

from ditserve.service.errors import (
    DeadlineExceeded,
    InternalError,
    JobLost,
    QueueUnavailable,
    WorkerLost,
    to_wire,
)
from ditserve.service.jobs import CallbackState, Claim, DueCallback, Job, JobResult, Lease, Progress, Renewal
from ditserve.service.limits import Limits
from ditserve.service.queue.clock import SKEW_S, QueueClock
from ditserve.service.queue.connection import RETRY_AFTER_S, Scripts, of_another_kind
from ditserve.service.queue.keys import Keys
from ditserve.service.queue.reads import Reads
from ditserve.service.telemetry import metrics
from ditserve.service.wire import NEWEST, OLDEST, WireError, pack

CANCELLED = 2  # one of the answers of renew.lua
CLOCK_MOVED = -1  # one of the answers of sweep.lua

LOST = pack(to_wire(JobLost()), OLDEST)  # what the waiters of a job are told whose record is gone

log = structlog.get_logger()


class LeaseVerbs(Reads):
    """The part of the broker that works on leased jobs, by its scripts.

    `clock` (seconds) replaces the server's own in tests.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        limits: Limits,
        *,
        timeout_s: float,
        clock: Callable[[], float] | None,
    ) -> None:
        super().__init__(url, keys, timeout_s=timeout_s)
        self.limits = limits
        self._given_clock = clock
        if clock is not None:
            self.clock = QueueClock(local=clock, wall=clock)
        self._scripts = Scripts(self._client, self.keys.permanent, timeout_s=timeout_s)
        self._claim_nonces: dict[str, str] = {}  # by owner, of claims without an answer so far
        self._given_rows: dict[str, int] = {}  # by owner

    async def claim(
        self,
        owner: str,
        *,
        models: Sequence[str],
        max_samples: int,
        idle: bool = True,
        reserved: int = 0,
        crowded: Collection[str] = (),
    ) -> list[Claim]:
        """Lease the next jobs in fair order, of at most `max_samples` samples together.

        Beyond these, one job of each flow (`Job.flow`) that is not `crowded` may have some of `reserved`
        samples more. An `idle` owner runs nothing else. Only an idle owner is given a single job
        that exceeds `max_samples`, or a poison candidate to run alone.
        """
        if max_samples <= 0 and reserved <= 0:
            return []
        # One nonce until a claim is answered, so that a repeated claim is given the same jobs.
        nonce = self._claim_nonces.setdefault(owner, uuid.uuid4().hex)
        patience = ms(self.limits.lease_s)
        given, *entries = await self._run(
            "claim",
            owner,
            nonce,
            packed({"worker": owner}),
            packed(to_wire(DeadlineExceeded("The deadline passed before a worker was free."))),
            max_samples,
            int(idle),
            patience,
            OLDEST,
            NEWEST,
            reserved,
            len(models),
            *models,
            *crowded,
        )
        claims = [await self._read_claim(owner, entry) for entry in entries]
        # Forgotten only now: should Redis fail meanwhile, a repeated claim is given the same jobs.
        del self._claim_nonces[owner]
        self._given_rows[owner] = given
        return [claim for claim in claims if claim is not None]

    async def _read_claim(self, owner: str, entry: Sequence[Any]) -> Claim | None:
        """Return a claimed job, as claim.lua answers; fail one that no worker can read, and return None."""
        job_id, wire, attempt, suspect, checkpoint, version = entry
        lease = Lease(job_id.decode(), owner, attempt, version)
        try:
            return Claim(Job.from_bytes(wire), lease, run_isolated=bool(suspect), checkpoint=checkpoint)
        except WireError as error:
            metrics.UNREADABLE.labels("job").inc()
            log.warning("job cannot be read", job=lease.job_id, reason=str(error))
            await self.fail(lease, to_wire(InternalError(f"The worker cannot read this job: {error}.")))
            return None

    def given_rows(self, owner: str) -> int:
        """Return the rows that `owner` was ever given, as its last claim said; its reports repeat them."""
        return self._given_rows.get(owner, 0)

    async def renew(self, leases: Sequence[Lease], *, predicted_s: float = 0.0) -> Renewal:
        """Extend leases that are still held, and return which are not.

        None is extended for longer than `Limits.longest_run_s` of jobs predicted to run for `predicted_s`.
        """
        tokens = [part for lease in leases for part in _token(lease)]
        verdicts = await self._run("renew", ms(self.limits.longest_run_s(predicted_s)), *tokens)
        pairs = list(zip(leases, verdicts, strict=True))
        return Renewal(
            lost=frozenset(lease.job_id for lease, verdict in pairs if verdict),
            cancelled=frozenset(lease.job_id for lease, verdict in pairs if verdict == CANCELLED),
        )

    async def progress(self, *events: Progress) -> list[bool]:
        """Append events, in order and in one exchange. Return False for each whose lease is lost.

        `step` and `steps` of a step event also go to the job's status; those of a preview are its sample's.
        The call is not repeated after a lost answer: an event would come twice, and the next one makes up for
        one that is lost.
        """
        args = [part for event in events for part in _progress_args(event)]
        return [bool(held) for held in await self._run("progress", *args, repeatable=False)]

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        """Store the result and end the job. Return False if the lease is lost: the result is then dropped."""
        how = {"rung": result.rung, "degraded": result.degraded, "steps": result.steps_used}
        messages = result.to_bytes(lease.version), pack(how, lease.version)
        args = (*_token(lease), *messages, result.steps_used)
        return bool(await self._run("finish", *args, ms(self.limits.result_ttl_s), self.limits.result_bytes))

    async def fail(self, lease: Lease, error: Mapping[str, Any], *, retry: bool = False) -> bool:
        """End the job with an error, or with `retry` queue it again while it has attempts left.

        Return False if the lease is lost.
        """
        data = pack(error, lease.version)
        return bool(await self._run("fail", *_token(lease), data, int(retry), *self._attempt_limits()))

    async def hand_back(self, lease: Lease, *, checkpoint: bytes = b"", step: int = 0) -> bool:
        """Return a job to the head of the queue without counting the attempt.

        Return False if the lease is lost. The next claim of it is given the checkpoint, unless that is larger
        than `Limits.checkpoint_bytes`.
        """
        if len(checkpoint) > self.limits.checkpoint_bytes:
            checkpoint, step = b"", 0
        ttl = ms(self.limits.checkpoint_ttl_s)
        return bool(await self._run("hand_back", *_token(lease), packed({}), checkpoint, step, ttl))

    async def due_callbacks(self, most: int, *, lease_s: float) -> list[DueCallback]:
        """Lease at most so many callbacks that are due, the longest due first.

        A job that ends is due by the script that ends it, so no end is missed. One whose process dies is due
        again when its lease ends.
        """
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

    async def sweep(self) -> int:
        """Take back the jobs whose lease has ended; return how many.

        Raise `QueueUnavailable` if the clock of Redis was set: then no lease tells whether its worker lives.
        """
        fault = packed(to_wire(WorkerLost("The worker that ran this job stopped answering.")))
        now, tolerance = ms(self.clock()), ms(max(SKEW_S, self.limits.lease_s / 3))
        ended = int(await self._run("sweep", *self._attempt_limits(), fault, now, tolerance))
        if ended == CLOCK_MOVED:
            raise QueueUnavailable("The clock of Redis was set.", retry_after=RETRY_AFTER_S)
        return ended

    def _attempt_limits(self) -> tuple[int, int, int]:
        return self.limits.max_attempts, ms(self.limits.dead_ttl_s), self.limits.dead_kept

    async def _run(self, name: str, *args: bytes | str | float, repeatable: bool = True) -> Any:
        now = "" if self._given_clock is None else ms(self._given_clock())
        times = ms(self.limits.record_ttl_s), ms(self.limits.lease_s)
        common = (self.keys.prefix, now, *times, self.limits.events_kept, LOST)
        try:
            return await self._scripts.run(name, *common, *args, repeatable=repeatable)
        except QueueUnavailable as error:
            if not of_another_kind(error.__cause__):
                raise
            removed = await self._scripts.run("repair", *common)
            log.error("indexes of another kind were removed", script=name, indexes=removed)
            return await self._scripts.run(name, *common, *args, repeatable=repeatable)


def packed(fields: Mapping[str, Any]) -> bytes:
    """Return a message that readers of every release understand."""
    return pack(fields, OLDEST)


def ms(seconds: float) -> int:
    return round(seconds * 1000)


def _token(lease: Lease) -> tuple[str, str, int]:
    return lease.job_id, lease.owner, lease.attempt


def _progress_args(event: Progress) -> tuple[str | int | bytes, ...]:
    data, of_job = event.data, event.kind == "step"
    step, steps = (data.get("step", ""), data.get("steps", "")) if of_job else ("", "")
    return (*_token(event.lease), event.kind, pack(data, event.lease.version), step, steps)
