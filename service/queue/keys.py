"""Every key and channel the service uses in Redis, by name.

All keys of a namespace carry one hash tag, so a script may touch any of them in a cluster. A key either has a
TTL, or is listed in `permanent` with what bounds it, or belongs to a job that has not ended yet. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    namespace: str

    @property
    def prefix(self) -> str:
        return f"{{{self.namespace}}}:"

    @property
    def queue(self) -> str:
        """Sorted set: waiting job → virtual finish time (see submit.lua). Bounded by the queue limit."""
        return self.prefix + "queue"

    @property
    def ages(self) -> str:
        """Sorted set: waiting job → when it was queued, ms. The members of `queue`."""
        return self.prefix + "ages"

    @property
    def leases(self) -> str:
        """Sorted set: running job → when its lease ends, ms. Bounded by the room of the workers."""
        return self.prefix + "leases"

    @property
    def flows(self) -> str:
        """Sorted set: flow (caller and priority) → last virtual finish time.

        A flow is dropped once the virtual clock has passed it; all are when the queue is empty.
        """
        return self.prefix + "flows"

    @property
    def dues(self) -> str:
        """Sorted set by name: flow, when due, waiting job.

        The members of `queue`, except for those put back into it.
        """
        return self.prefix + "dues"

    @property
    def totals(self) -> str:
        """Hash of nine fields.

        They are `rows` waiting, virtual `clock`, `bytes` of stored results, `dead` and lost (`orphans`) jobs
        ever, deadlines ever `kept` and `broken`, when all this was last `reconciled` (ms), and how far all
        keys were `scanned`.
        """
        return self.prefix + "totals"

    @property
    def dead(self) -> str:
        """Sorted set: dead-lettered job → when it died, ms. Trimmed by age and count."""
        return self.prefix + "dead"

    @property
    def results(self) -> str:
        """Sorted set: job with a stored result → when the result expires, ms.

        Trimmed by age and byte budget.
        """
        return self.prefix + "results"

    @property
    def sizes(self) -> str:
        """Hash: job with a stored result → bytes. The members of `results`."""
        return self.prefix + "sizes"

    @property
    def workers(self) -> str:
        """Sorted set: worker → when its last report goes stale, ms. Trimmed at every report."""
        return self.prefix + "workers"

    @property
    def reports(self) -> str:
        """Hash: worker → its last report. The members of `workers`."""
        return self.prefix + "reports"

    @property
    def unfinished(self) -> str:
        """Hash: caller → how many of its jobs have not ended. A caller without any has no field."""
        return self.prefix + "unfinished"

    @property
    def callbacks(self) -> str:
        """Sorted set: job that has ended and whose sender is to be called back → when, ms.

        Bounded by the records of such jobs: each is settled before its record expires.
        """
        return self.prefix + "callbacks"

    @property
    def permanent(self) -> tuple[str, ...]:
        """Return the keys without a TTL, in the order in which the scripts take them."""
        return (
            self.queue,
            self.ages,
            self.leases,
            self.flows,
            self.dues,
            self.totals,
            self.dead,
            self.results,
            self.sizes,
            self.workers,
            self.reports,
            self.unfinished,
            self.callbacks,
        )

    def job(self, job_id: str) -> str:
        """Hash: the job, its state and its fencing token. No TTL until it ends."""
        return f"{self.prefix}job:{job_id}"

    def events(self, job_id: str) -> str:
        """Stream: the job's progress. Bounded length; TTL from the last entry."""
        return f"{self.prefix}events:{job_id}"

    def result(self, job_id: str) -> str:
        """String: the job's result. TTL."""
        return f"{self.prefix}result:{job_id}"

    def checkpoint(self, job_id: str) -> str:
        """String: the checkpoint that a worker left of a job.

        TTL; removed when the job ends or its next worker is lost.
        """
        return f"{self.prefix}checkpoint:{job_id}"

    def holders(self, job_id: str) -> str:
        """Set: the further requests that wait for a job's images. TTL; removed when the job ends."""
        return f"{self.prefix}holders:{job_id}"

    def equal(self, digest: str) -> str:
        """String: the job last queued for the pictures of this digest. TTL."""
        return f"{self.prefix}equal:{digest}"

    def claim(self, owner: str) -> str:
        """Hash: the jobs of the owner's last claim, for the case that the answer was lost.

        TTL of one lease.
        """
        return f"{self.prefix}claim:{owner}"

    def given(self, worker: str) -> str:
        """String: rows the worker was ever given. TTL of a lease, or of its last report."""
        return f"{self.prefix}given:{worker}"

    def agreed(self, name: str) -> str:
        """String: what the workers agreed on under this name. TTL from when one asked last."""
        return f"{self.prefix}agreed:{name}"

    @property
    def work_channel(self) -> str:
        """Channel: a job became available; the message is its flow, or empty if that does not matter."""
        return self.prefix + "work"

    @property
    def cancelled_channel(self) -> str:
        """Channel: a running job was cancelled; the message is its id."""
        return self.prefix + "cancelled"

    @property
    def ended_channel(self) -> str:
        """Channel: a job reached a terminal state; the message is its id."""
        return self.prefix + "ended"
