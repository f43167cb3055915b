"""The queue: jobs, leases, events and results in Redis.

Every verb that changes a job is one Lua script (`lua/`) of the same name, so that a job is always in exactly
one state. All scripts but `progress` may be repeated after a lost answer, and are. Nothing here looks at
images or runs a model. `leases` has the verbs that need a lease, `reads` those that change nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import structlog

from ditserve.service.errors import (
    Cancelled,
    QueueFull,
    QueueUnavailable,
    QuotaExceeded,
    to_wire,
)
from ditserve.service.fleet import LoadSnapshot, Starting, WorkerState, read_report
from ditserve.service.jobs import WEIGHTS, EqualJobs, Job
from ditserve.service.limits import Limits
from ditserve.service.queue.connection import RETRY_AFTER_S
from ditserve.service.queue.keys import Keys
from ditserve.service.queue.leases import LeaseVerbs, ms, packed
from ditserve.service.queue.notifications import Subscriber, WorkNotifications
from ditserve.service.telemetry import metrics
from ditserve.service.wire import OLDEST, WireError

# The answers of submit.lua, besides 1 (queued) and 0 (known).
TOO_MANY_JOBS, TOO_MUCH_WORK, TOO_MANY_OF_CALLER, OVERTAKEN = -1, -2, -3, -4

KEEPS_ALL = "noeviction"  # the `maxmemory-policy` that the service needs

ACCEPTED_KEPT = 16384  # jobs remembered that this process has queued

log = structlog.get_logger()


class Overtaken(Exception):
    """An equal job was queued since one was looked for: look again."""


class Broker(LeaseVerbs):
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
        super().__init__(url, Keys(namespace), limits or Limits(), timeout_s=timeout_s, clock=clock)
        self.work = WorkNotifications(self._waiting_client, self.keys)
        self._accepted: dict[str, float] = {}  # job → when its record may expire; in order
        self._unreadable_workers: set[bytes] = set()
        self._policy = KEEPS_ALL

    @classmethod
    def open(
        cls,
        url: str,
        *,
        namespace: str = "dit",
        timeout_s: float = 3.0,
        clock: Callable[[], float] | None = None,
        **limits: Any,
    ) -> Broker:
        """Return a broker that has not asked its server yet; `limits` are the fields of `Limits`.

        Raises `ValueError` for a malformed URL.
        """
        if "result_ttl_s" in limits:
            limits.setdefault("record_ttl_s", 2 * limits["result_ttl_s"])
        return cls(url, namespace=namespace, limits=Limits(**limits), timeout_s=timeout_s, clock=clock)

    @classmethod
    async def connect(cls, url: str, **options: Any) -> Broker:
        """Return a broker whose server has answered; `options` are those of `open`.

        Raises:
            ValueError: the URL is malformed.
            QueueUnavailable: Redis cannot be used.
        """
        broker = cls.open(url, **options)
        try:
            await broker.start()
        except BaseException:
            await broker.aclose()
            raise
        return broker

    async def start(self) -> None:
        """Send the scripts to the server and read its clock. Until then the clock is that of this host.

        Raises `QueueUnavailable`.
        """
        await self._scripts.load()
        await self.check_eviction()
        if self._given_clock is None:
            await self.start_clock()

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

    async def submit(self, job: Job, *, at_once: int | None = None, equal: EqualJobs | None = None) -> bool:
        """Queue a job. Return True if it is new, False if its id is known.

        Args:
            at_once: how many unfinished jobs its caller may have; None: any number.
            equal: where further requests for the same pictures find it; None: nowhere.

        Raises:
            QueueFull, QuotaExceeded: the queue, or the caller, has as much as allowed.
            Overtaken: another job has the place by now.
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
            ms(self.limits.patience_s),
            job.caller,
            "" if at_once is None else at_once,
            packed({}),
            *(("", "", 0) if equal is None else (equal.digest, equal.seen, ms(equal.keep_s))),
            "1" if job.callback_url else "",
        )
        if verdict == OVERTAKEN:
            raise Overtaken()
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

    async def cancel(self, job_id: str, *, holder: str = "") -> bool:
        """End a waiting or running job; its worker drops it at the next step.

        While others have joined it, it runs on for them. With the `holder` under which one joined, that one
        leaves it. Return False if it had ended or is unknown.
        """
        return bool(await self._run("cancel", job_id, packed(to_wire(Cancelled())), holder))

    async def join(self, job_id: str, holder: str) -> bool:
        """Wait for an unfinished job's images as well, until `cancel` with this holder.

        Return False if it has ended, was cancelled, or is unknown.
        """
        return bool(await self._run("join", job_id, holder))

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
        return bool(await self._run("requeue", job_id, packed({})))

    async def agree(self, name: str, proposal: str) -> str:
        """Return the value of `name` that holds for all: the first proposed, kept long after its last use.

        An empty proposal only asks; the answer is empty while there is none.
        """
        agreed: bytes = await self._run("agree", name, proposal, ms(self.limits.agreed_ttl_s))
        return agreed.decode(errors="replace")

    async def report(self, report: WorkerState | Starting) -> None:
        """Publish a worker's report, until the next one or until it goes stale."""
        await self._run("report", report.worker, report.to_bytes(OLDEST), ms(self.limits.report_ttl_s))

    async def retire(self, worker: str) -> None:
        """Withdraw a worker's report."""
        await self._run("report", worker, b"", 0)

    def subscribe(
        self, handlers: Mapping[str, Callable[[str], None]], *, connected: Callable[[], None]
    ) -> Subscriber:
        """Return a subscription to channels, on a connection of its own."""
        return Subscriber(self._waiting_client, handlers, connected=connected)
