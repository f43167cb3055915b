"""The queue: jobs, leases, events and results in Redis.

Every verb that changes a job is one Lua script (`lua/`), so that a job is always in exactly one state. A
lease carries a fencing token (owner, attempt): what a worker writes counts only while it holds the job.
Scripts may be repeated after a lost answer. Every verb raises `QueueUnavailable` when Redis cannot be used.
Nothing here looks at images or runs a model.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from ditserve.service.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    QueueFull,
    QueueUnavailable,
    QuotaExceeded,
    ServiceError,
    WorkerLost,
    to_wire,
)
from ditserve.service.jobs import (
    Claim,
    Job,
    JobEvent,
    JobResult,
    JobStatus,
    Lease,
    LoadSnapshot,
    Renewal,
    Starting,
    WorkerState,
    read_report,
)
from ditserve.service.limits import Limits
from ditserve.service.queue.bell import Bell
from ditserve.service.queue.connection import RETRY_AFTER_S, Scripts, open_client, reaching
from ditserve.service.queue.events import follow
from ditserve.service.queue.keys import Keys
from ditserve.service.queue.records import Records
from ditserve.service.queue.subscriber import Subscriber
from ditserve.service.wire import WireError, pack

WEIGHTS = {"low": 0.25, "normal": 1.0, "high": 4.0}


class Broker:
    """One process's door to the queue. Open it with `connect`, close it with `aclose`."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "dit",
        limits: Limits | None = None,
        timeout_s: float = 3.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`clock` (seconds) replaces the server's own in tests. Raises `ValueError` for a malformed URL."""
        self.keys = Keys(namespace)
        self.limits = limits or Limits()
        self._clock, self._timeout_s = clock, timeout_s
        self._client = open_client(url, connections=32)
        self._readers = open_client(url, connections=4096)
        self._scripts = Scripts(self._client, self.keys.permanent, timeout_s=timeout_s)
        self._records = Records(self._client, self.keys, timeout_s=timeout_s)
        self._claims: dict[str, str] = {}
        self._given: dict[str, int] = {}
        self._bell = Bell(self._readers, self.keys)

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
        """A broker whose server has answered; `limits` are the fields of `Limits`. Raises `ValueError`,
        `QueueUnavailable`.
        """
        if "result_ttl_s" in limits:
            limits.setdefault("record_ttl_s", 2 * limits["result_ttl_s"])
        broker = cls(url, namespace=namespace, limits=Limits(**limits), timeout_s=timeout_s, clock=clock)
        try:
            await broker._scripts.load()
        except QueueUnavailable:
            await broker.aclose()
            raise
        return broker

    async def aclose(self) -> None:
        await self._bell.aclose()
        await self._client.aclose()
        await self._readers.aclose()

    async def ping(self) -> bool:
        try:
            async with reaching(self._timeout_s):
                return bool(await self._client.ping())
        except QueueUnavailable:
            return False

    # What the API does.

    async def submit(self, job: Job, *, at_once: int | None = None) -> bool:
        """Queue a job: True if it is new, False if its id is known. `at_once` is how many unfinished jobs its caller may have.

        Raises `QueueFull`, `QuotaExceeded`.
        """
        verdict = await self._run(
            "submit",
            job.id,
            job.to_bytes(),
            uuid.uuid4().hex,
            f"{job.priority}:{job.caller}",
            job.model,
            "" if job.deadline_at is None else round(job.deadline_at * 1000),
            WEIGHTS[job.priority],
            max(1, job.cost_rows),
            len(job.seeds),
            self.limits.queue_limit,
            self.limits.queue_rows,
            self._ms(self.limits.patience_s),
            job.caller,
            "" if at_once is None else at_once,
            pack({}),
        )
        if verdict == -3:
            raise QuotaExceeded(
                f"This key may have {at_once} unfinished jobs at a time.", retry_after=RETRY_AFTER_S
            )
        if verdict == -1:
            raise QueueFull(f"The queue holds its limit of {self.limits.queue_limit} jobs.")
        if verdict == -2:
            raise QueueFull("The queue holds as much predicted work as it may.")
        return bool(verdict)

    async def cancel(self, job_id: str) -> bool:
        """End a waiting or running job; its worker drops it at the next step. False if it had ended or is
        unknown.
        """
        return bool(await self._run("cancel", job_id, pack(to_wire(Cancelled()))))

    async def status(self, job_id: str) -> JobStatus | None:
        return await self._records.status(job_id)

    async def result(self, job_id: str) -> JobResult | None:
        return await self._records.result(job_id)

    async def outcome(self, job_id: str) -> JobResult | None:
        """The result, or None while the job has not ended. Raises the job's own error, `JobNotFound` or
        `JobExpired`.
        """
        return await self._records.outcome(job_id)

    async def outcomes(self, job_ids: Sequence[str]) -> list[JobResult | ServiceError | None]:
        """What `outcome` returns or raises for each of several jobs, in one exchange."""
        return await self._records.outcomes(job_ids)

    def events(self, job_id: str, after: str = "0-0") -> AsyncIterator[JobEvent]:
        """The job's events after the given id, as they come; ends after a terminal one. Raises `JobNotFound`."""
        return follow(self._readers, self.keys, job_id, after)

    async def load(self) -> LoadSnapshot:
        jobs, rows, oldest, now, dead, *reports = await self._run("load")
        found = [(read_report(report), given) for report, given in reports]
        workers = tuple(each for each, _ in found if isinstance(each, WorkerState))
        starting = tuple(each for each, _ in found if isinstance(each, Starting))
        # What a worker was given since it reported is seen by nobody else.
        rows += sum(max(0, given - each.given_rows) for each, given in found if isinstance(each, WorkerState))
        age = (now - oldest) / 1000 if oldest else 0.0
        return LoadSnapshot(jobs, rows, age, workers, now / 1000, dead, starting)

    async def dead(self) -> list[JobStatus]:
        """The dead-lettered jobs, oldest first."""
        return await self._records.dead()

    async def requeue(self, job_id: str) -> bool:
        """Give a dead job its attempts back. False if it is not dead."""
        return bool(await self._run("requeue", job_id, pack({})))

    # What a worker does.

    async def claim(
        self, owner: str, *, models: Sequence[str], max_samples: int, idle: bool = True
    ) -> list[Claim]:
        """Lease the next jobs in fair order, of at most `max_samples` samples together.

        `idle` says that the owner runs nothing else: then it may be given a single job that exceeds the
        room, or a suspect to run alone.
        """
        if max_samples <= 0:
            return []
        nonce = self._claims.setdefault(owner, uuid.uuid4().hex)  # kept until a claim is answered
        lease = self._ms(self.limits.lease_s)
        given, *entries = await self._run(
            "claim",
            owner,
            nonce,
            pack({"worker": owner}),
            pack(to_wire(DeadlineExceeded("The deadline passed before a worker was free."))),
            max_samples,
            int(idle),
            lease,
            lease,
            *models,
        )
        del self._claims[owner]
        read = [await self._read_claim(owner, *entry) for entry in entries]
        self._given[owner] = given
        return [claim for claim in read if claim is not None]

    async def _read_claim(
        self, owner: str, job_id: bytes, wire: bytes, attempt: int, suspect: int, checkpoint: bytes
    ) -> Claim | None:
        lease = Lease(job_id.decode(), owner, attempt)
        try:
            return Claim(Job.from_bytes(wire), lease, run_isolated=bool(suspect), checkpoint=checkpoint)
        except WireError as error:
            await self.fail(lease, to_wire(InternalError(f"The worker cannot read this job: {error}.")))
            return None

    def given_rows(self, owner: str) -> int:
        """The rows that `owner` was ever given, as its last claim told: for the state it publishes."""
        return self._given.get(owner, 0)

    async def renew(self, leases: Sequence[Lease]) -> Renewal:
        args = [field for lease in leases for field in (lease.job_id, lease.owner, lease.attempt)]
        verdicts = await self._run(
            "renew", self._ms(self.limits.lease_s), self._ms(self.limits.max_run_s), *args
        )
        return Renewal(
            lost=frozenset(lease.job_id for lease, verdict in zip(leases, verdicts, strict=True) if verdict),
            cancelled=frozenset(
                lease.job_id for lease, verdict in zip(leases, verdicts, strict=True) if verdict == 2
            ),
        )

    async def progress(self, lease: Lease, kind: str, data: dict[str, Any]) -> bool:
        """Append an event; `step` and `steps` in the data also go to the job's status. False if the lease is
        lost.
        """
        step, steps = data.get("step", ""), data.get("steps", "")
        return bool(
            await self._run("progress", *_token(lease), kind, pack(data), step, steps, repeatable=False)
        )

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        """Store the result and end the job. False if the lease is lost: the result is then dropped."""
        summary = pack({"rung": result.rung, "degraded": result.degraded, "steps": result.steps_used})
        ttl, budget = self._ms(self.limits.result_ttl_s), self.limits.result_bytes
        return bool(
            await self._run(
                "finish", *_token(lease), result.to_bytes(), summary, result.steps_used, ttl, budget
            )
        )

    async def fail(self, lease: Lease, error: Mapping[str, Any], *, retry: bool = False) -> bool:
        """End the job with an error, or with `retry` queue it again while it has attempts. False if the lease
        is lost.
        """
        return bool(await self._run("fail", *_token(lease), pack(error), int(retry), *self._patience()))

    async def hand_back(self, lease: Lease, *, checkpoint: bytes = b"", step: int = 0) -> bool:
        """Return a job to the head of the queue without counting the attempt. False if the lease is lost.

        The next claim of it is given the checkpoint, unless that is larger than `checkpoint_bytes`.
        """
        if len(checkpoint) > self.limits.checkpoint_bytes:
            checkpoint, step = b"", 0
        ttl = self._ms(self.limits.checkpoint_ttl_s)
        return bool(await self._run("hand_back", *_token(lease), pack({}), checkpoint, step, ttl))

    async def sweep(self) -> int:
        """Take back the jobs whose lease has ended; returns how many."""
        fault = pack(to_wire(WorkerLost("The worker that ran this job stopped answering.")))
        return int(await self._run("sweep", *self._patience(), fault))

    async def publish_state(self, state: WorkerState | Starting) -> None:
        await self._run("report", state.worker, state.to_bytes(), self._ms(self.limits.report_ttl_s))

    async def retire(self, worker: str) -> None:
        """Forget a worker's published state."""
        await self._run("report", worker, b"", 0)

    async def wait_for_work(self, timeout_s: float) -> None:
        """Until a job became available since the last call, `wake` was called, or the timeout."""
        await self._bell.wait(timeout_s)

    def wake(self) -> None:
        """End `wait_for_work`."""
        self._bell.ring()

    def watch(self, cancelled: Callable[[str], None]) -> None:
        """From now on call `cancelled(job_id)` for every running job that is cancelled, of any worker's."""
        self._bell.listen(cancelled)

    def subscribe(
        self, handlers: Mapping[str, Callable[[str], None]], *, connected: Callable[[], None]
    ) -> Subscriber:
        """A subscription on a connection of its own."""
        return Subscriber(self._readers, handlers, connected=connected)

    def _patience(self) -> tuple[int, int, int]:
        return self.limits.max_attempts, self._ms(self.limits.dead_ttl_s), self.limits.dead_kept

    async def _run(self, name: str, *args: bytes | str | float, repeatable: bool = True) -> Any:
        now = "" if self._clock is None else self._ms(self._clock())
        limits = self.limits
        common = (self.keys.prefix, now, self._ms(limits.record_ttl_s), limits.events_kept)
        return await self._scripts.run(name, *common, *args, repeatable=repeatable)

    @staticmethod
    def _ms(seconds: float) -> int:
        return round(seconds * 1000)


def _token(lease: Lease) -> tuple[str, str, int]:
    return lease.job_id, lease.owner, lease.attempt
