"""The queue: jobs, leases, events and results in Redis.

Every verb that changes a job is one Lua script (`lua/`) of the same name, so that a job is always in exactly
one state. A lease carries a fencing token (owner, attempt): what a worker writes counts only while it holds
the job. All scripts but `progress` may be repeated after a lost answer, and are. Nothing here looks at images
or runs a model.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import structlog

from ditserve.service.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    JobLost,
    QueueFull,
    QueueUnavailable,
    QuotaExceeded,
    WorkerLost,
    to_wire,
)
from ditserve.service.jobs import (
    WEIGHTS,
    Claim,
    EventKind,
    Job,
    JobResult,
    Lease,
    LoadSnapshot,
    Renewal,
    Starting,
    WorkerState,
    read_report,
)
from ditserve.service.limits import Limits
from ditserve.service.queue.clock import SKEW_S, QueueClock
from ditserve.service.queue.connection import RETRY_AFTER_S, Scripts, of_another_kind
from ditserve.service.queue.keys import Keys
from ditserve.service.queue.notifications import Subscriber, WorkNotifications
from ditserve.service.queue.reads import Reads
from ditserve.service.telemetry import metrics
from ditserve.service.wire import NEWEST, OLDEST, WireError, pack

# The answers of submit.lua, besides 1 (queued) and 0 (known).
TOO_MANY_JOBS, TOO_MUCH_WORK, TOO_MANY_OF_CALLER = -1, -2, -3

CANCELLED = 2  # one of the answers of renew.lua
CLOCK_MOVED = -1  # one of the answers of sweep.lua

KEEPS_ALL = "noeviction"  # the `maxmemory-policy` that the service needs

LOST = pack(to_wire(JobLost()), OLDEST)  # what the waiters of a job are told whose record is gone

ACCEPTED_KEPT = 16384  # jobs remembered that this process has queued

log = structlog.get_logger()


class Broker(Reads):
    """One process's access to the queue. Open it with `connect`, close it with `aclose`.

    Every verb raises `QueueUnavailable` when Redis cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "dit",
        limits: Limits | None = None,
        timeout_s: float = 3.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`clock` (seconds) replaces the server's own in tests. Raise `ValueError` for a malformed URL."""
        super().__init__(url, Keys(namespace), timeout_s=timeout_s)
        self.limits = limits or Limits()
        self.work = WorkNotifications(self._waiting_client, self.keys)
        self._given_clock = clock
        if clock is not None:
            self.clock = QueueClock(local=clock, wall=clock)
        self._scripts = Scripts(self._client, self.keys.permanent, timeout_s=timeout_s)
        self._claim_nonces: dict[str, str] = {}  # by owner, of claims without an answer so far
        self._given_rows: dict[str, int] = {}  # by owner
        self._accepted: dict[str, float] = {}  # job → when its record may expire; in order
        self._unreadable_workers: set[bytes] = set()
        self._policy = KEEPS_ALL

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        namespace: str = "dit",
        timeout_s: float = 3.0,
        clock: Callable[[], float] | None = None,
        **limits: Any,
    ) -> Broker:
        """Return a broker whose server has answered; `limits` are the fields of `Limits`.

        Raises:
            ValueError: the URL is malformed.
            QueueUnavailable: Redis cannot be used.
        """
        if "result_ttl_s" in limits:
            limits.setdefault("record_ttl_s", 2 * limits["result_ttl_s"])
        broker = cls(url, namespace=namespace, limits=Limits(**limits), timeout_s=timeout_s, clock=clock)
        try:
            await broker._scripts.load()
            await broker.check_eviction()
            if clock is None:
                await broker.start_clock()
        except QueueUnavailable:
            await broker.aclose()
            raise
        return broker

    async def aclose(self) -> None:
        await self.work.aclose()
        await super().aclose()

    async def check_eviction(self) -> None:
        """Warn once if Redis may evict what it was given; say nothing if it does not tell."""
        try:
            memory = await self._ask(lambda: self._client.info("memory"))
        except QueueUnavailable:
            return
        policy = memory.get("maxmemory_policy", KEEPS_ALL)
        metrics.REDIS_EVICTS.set(policy != KEEPS_ALL)
        changed, self._policy = policy != self._policy, policy
        if changed and policy != KEEPS_ALL:
            log.warning(
                "Redis may evict accepted jobs when its memory is full: set maxmemory-policy noeviction",
                policy=policy,
            )

    async def ping(self) -> bool:
        """Return whether Redis answers."""
        try:
            return bool(await self._ask(self._client.ping))
        except QueueUnavailable:
            return False

    # The API's verbs.

    async def submit(self, job: Job, *, at_once: int | None = None) -> bool:
        """Queue a job. Return True if it is new, False if its id is known.

        Args:
            at_once: how many unfinished jobs its caller may have; None: any number.

        Raises:
            QueueFull, QuotaExceeded: the queue, or the caller, has as much as allowed.
        """
        verdict = await self._run(
            "submit",
            job.id,
            job.to_bytes(),
            uuid.uuid4().hex,
            job.flow,
            job.model,
            "" if job.deadline_at is None else round(job.deadline_at * 1000),
            WEIGHTS[job.priority],
            max(1, job.cost_rows),
            len(job.seeds),
            self.limits.queue_limit,
            self.limits.queue_rows,
            _ms(self.limits.patience_s),
            job.caller,
            "" if at_once is None else at_once,
            _pack({}),
        )
        if verdict == TOO_MANY_OF_CALLER:
            raise QuotaExceeded(
                f"This key may have {at_once} unfinished jobs at a time.", retry_after=RETRY_AFTER_S
            )
        if verdict == TOO_MANY_JOBS:
            raise QueueFull(f"The queue holds its limit of {self.limits.queue_limit} jobs.")
        if verdict == TOO_MUCH_WORK:
            raise QueueFull("The queue holds as much predicted work as it may.")
        self._remember(job.id)
        return bool(verdict)

    def _remember(self, job_id: str) -> None:
        self._accepted.pop(job_id, None)
        self._accepted[job_id] = time.monotonic() + self.limits.record_ttl_s
        if len(self._accepted) > ACCEPTED_KEPT:
            del self._accepted[next(iter(self._accepted))]

    def accepted(self, job_id: str) -> bool:
        """Return whether this process queued the job so recently that its record cannot have expired."""
        return time.monotonic() < self._accepted.get(job_id, 0.0)

    async def cancel(self, job_id: str) -> bool:
        """End a waiting or running job; its worker drops it at the next step.

        Return False if it had ended or is unknown.
        """
        return bool(await self._run("cancel", job_id, _pack(to_wire(Cancelled()))))

    async def load(self) -> LoadSnapshot:
        """Return the load of the queue and of the workers alive."""
        jobs, rows, oldest, now, dead, orphans, kept, broken, *replies = await self._run("load")
        reports = list(self._read_reports(replies))
        workers = tuple(report for report, _ in reports if isinstance(report, WorkerState))
        starting = tuple(report for report, _ in reports if isinstance(report, Starting))
        # Rows given to a worker since its report have left the queue, and are not in the worker's backlog
        # yet.
        rows += sum(
            max(0, given - report.given_rows) for report, given in reports if isinstance(report, WorkerState)
        )
        age = (now - oldest) / 1000 if oldest else 0.0
        return LoadSnapshot(jobs, rows, age, workers, now / 1000, dead, starting, orphans, kept, broken)

    def _read_reports(
        self, replies: Sequence[tuple[bytes, bytes | None, int]]
    ) -> Iterator[tuple[WorkerState | Starting, int]]:
        """Yield each report, and the rows ever given to its worker.

        A report that cannot be read is left out, and logged once for each worker.
        """
        unreadable = set()
        for worker, data, given in replies:
            try:
                yield read_report(data or b""), given
            except WireError as error:
                unreadable.add(worker)
                if worker not in self._unreadable_workers:
                    metrics.UNREADABLE.labels("report").inc()
                    log.warning("report left out", worker=worker.decode(errors="replace"), reason=str(error))
        self._unreadable_workers = unreadable

    async def requeue(self, job_id: str) -> bool:
        """Queue a dead job again, with all its attempts. Return False if it is not dead."""
        return bool(await self._run("requeue", job_id, _pack({})))

    # A worker's verbs.

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
        patience = _ms(self.limits.lease_s)
        given, *entries = await self._run(
            "claim",
            owner,
            nonce,
            _pack({"worker": owner}),
            _pack(to_wire(DeadlineExceeded("The deadline passed before a worker was free."))),
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
        verdicts = await self._run("renew", _ms(self.limits.longest_run_s(predicted_s)), *tokens)
        pairs = list(zip(leases, verdicts, strict=True))
        return Renewal(
            lost=frozenset(lease.job_id for lease, verdict in pairs if verdict),
            cancelled=frozenset(lease.job_id for lease, verdict in pairs if verdict == CANCELLED),
        )

    async def progress(self, lease: Lease, kind: EventKind, data: dict[str, Any]) -> bool:
        """Append an event. Return False if the lease is lost.

        `step` and `steps` of a step event also go to the job's status; those of a preview are its sample's.
        It is not repeated after a lost answer: an event would come twice, and the next one makes up for one
        that is lost.
        """
        step, steps = (data.get("step", ""), data.get("steps", "")) if kind == "step" else ("", "")
        args = (*_token(lease), kind, pack(data, lease.version), step, steps)
        return bool(await self._run("progress", *args, repeatable=False))

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        """Store the result and end the job. Return False if the lease is lost: the result is then dropped."""
        how = {"rung": result.rung, "degraded": result.degraded, "steps": result.steps_used}
        messages = result.to_bytes(lease.version), pack(how, lease.version)
        args = (*_token(lease), *messages, result.steps_used)
        return bool(await self._run("finish", *args, _ms(self.limits.result_ttl_s), self.limits.result_bytes))

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
        ttl = _ms(self.limits.checkpoint_ttl_s)
        return bool(await self._run("hand_back", *_token(lease), _pack({}), checkpoint, step, ttl))

    async def sweep(self) -> int:
        """Take back the jobs whose lease has ended; return how many.

        Raise `QueueUnavailable` if the clock of Redis was set: then no lease tells whether its worker lives.
        """
        fault = _pack(to_wire(WorkerLost("The worker that ran this job stopped answering.")))
        now, tolerance = _ms(self.clock()), _ms(max(SKEW_S, self.limits.lease_s / 3))
        ended = int(await self._run("sweep", *self._attempt_limits(), fault, now, tolerance))
        if ended == CLOCK_MOVED:
            raise QueueUnavailable("The clock of Redis was set.", retry_after=RETRY_AFTER_S)
        return ended

    async def report(self, report: WorkerState | Starting) -> None:
        """Publish a worker's report, until the next one or until it goes stale."""
        await self._run("report", report.worker, report.to_bytes(OLDEST), _ms(self.limits.report_ttl_s))

    async def retire(self, worker: str) -> None:
        """Withdraw a worker's report."""
        await self._run("report", worker, b"", 0)

    def subscribe(
        self, handlers: Mapping[str, Callable[[str], None]], *, connected: Callable[[], None]
    ) -> Subscriber:
        """Return a subscription to channels, on a connection of its own."""
        return Subscriber(self._waiting_client, handlers, connected=connected)

    def _attempt_limits(self) -> tuple[int, int, int]:
        return self.limits.max_attempts, _ms(self.limits.dead_ttl_s), self.limits.dead_kept

    async def _run(self, name: str, *args: bytes | str | float, repeatable: bool = True) -> Any:
        now = "" if self._given_clock is None else _ms(self._given_clock())
        times = _ms(self.limits.record_ttl_s), _ms(self.limits.lease_s)
        common = (self.keys.prefix, now, *times, self.limits.events_kept, LOST)
        try:
            return await self._scripts.run(name, *common, *args, repeatable=repeatable)
        except QueueUnavailable as error:
            if not of_another_kind(error.__cause__):
                raise
            removed = await self._scripts.run("repair", *common)
            log.error("indexes of another kind were removed", script=name, indexes=removed)
            return await self._scripts.run(name, *common, *args, repeatable=repeatable)


def _pack(fields: Mapping[str, Any]) -> bytes:
    """Return a message that readers of every release understand."""
    return pack(fields, OLDEST)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _token(lease: Lease) -> tuple[str, str, int]:
    return lease.job_id, lease.owner, lease.attempt
