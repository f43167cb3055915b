"""The engine as its worker sees it: its last report, and what follows from it for others and for leases."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from ditserve.service.fleet import LoadedAdapter, Network, WorkerState
from ditserve.service.jobs import Job
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.capacity import backlog_time
from ditserve.service.queue.broker import Broker
from ditserve.service.worker.engine_thread import EngineReport, EngineThread
from ditserve.service.worker.running_job import RunningJobs


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """The names by which others know a worker and what it serves.

    `name` is unique among all workers, ever: a restarted worker has a new one. `bundle` and `vocabulary` are
    digests of what it serves (`identity`); jobs of another vocabulary are refused. `origin` is that of the
    checkpoints it writes and goes on from (`handoff.checkpoint_origin`). `adapters` are those that it has
    loaded, None if its backend takes none; jobs drawn with others are refused. `formats` are the files it
    writes beyond those that every worker does.
    """

    name: str
    model: str
    bundle: str = ""
    vocabulary: str = ""
    origin: str = ""
    network: Network = field(default_factory=Network)
    adapters: tuple[LoadedAdapter, ...] | None = None
    formats: tuple[str, ...] = ()

    def replaced(self, job: Job) -> str:
        """Return a sentence on what the job was made for and this worker no longer has; "" if it has all."""
        if job.vocabulary not in ("", self.vocabulary):
            return "The model was replaced by a version with other classes; send the request again."
        loaded = {(adapter.name, adapter.version) for adapter in self.adapters or ()}
        for adapter in job.adapters:
            if (adapter.name, adapter.version) not in loaded:
                return f"The adapter {adapter.name!r} was replaced or removed; send the request again."
        return ""


class EngineMonitor:
    """The last report of an engine, beside the jobs that its worker holds."""

    def __init__(
        self,
        engine: EngineThread,
        jobs: RunningJobs,
        broker: Broker,
        *,
        identity: WorkerIdentity,
        policy: WorkerPolicy,
    ) -> None:
        self.report: EngineReport | None = None  # None: the engine is not ready yet
        self._engine, self._jobs, self._broker = engine, jobs, broker
        self._identity, self._policy = identity, policy
        self._busy_since = 0.0
        self._peak_s = 0.0  # the most work since it had none, in seconds

    def became_busy(self) -> None:
        """Note that the engine, which had nothing to do, is given samples now."""
        self._busy_since = time.monotonic()

    def worker_state(self) -> WorkerState | None:
        """Return what to publish about the worker; None before the engine is ready."""
        if self.report is None:
            return None
        report, costs = self.report, self.report.costs
        # Jobs claimed since the engine's last report count too: a step may take seconds.
        unreported = tuple(job.job.demand for job in self._jobs.not_joined(report.progress))
        return WorkerState(
            worker=self._identity.name,
            models=(self._identity.model,),
            max_rows=self._policy.max_rows,
            step_fixed_s=costs.fixed_s,
            step_per_row_s=costs.per_row_s,
            decode_s=costs.decode_s,
            running_samples=self._jobs.samples_in_engine,
            backlog_rows=report.backlog_rows + sum(bucket.rows for bucket in unreported),
            dues=report.demand + unreported,
            slow=costs.slow,
            network=self._identity.network,
            bundle=self._identity.bundle,
            adapters=self._identity.adapters,
            formats=self._identity.formats,
            given_rows=self._broker.given_rows(self._identity.name),
            last_step_age_s=self.step_age_s(),
            hang_s=self._hang_limit_s(),
            batch_rows=costs.saturation_rows,
            updated_at=self._broker.clock(),
        )

    def longest_run_s(self) -> float:
        """Return the predicted seconds of the slowest job: in every batch, or beside all that was claimed."""
        state = self.worker_state() if self._jobs else None
        self._peak_s = max(self._peak_s, backlog_time(state)) if state else 0.0
        return max(self._peak_s, max((job.job.steps for job in self._jobs), default=0) * self._engine.step_s)

    def step_age_s(self) -> float:
        """Return the seconds since the last step, 0 while there is nothing to step."""
        if self.report is None or not self._jobs.samples_in_engine:
            return 0.0
        return time.monotonic() - max(self.report.stepped_at, self._busy_since)

    async def until_hung(self) -> None:
        """Return when the engine hangs.

        It must be late twice in a row, because this process may itself have been stopped for a while.
        """
        late = 0
        while late < 2:
            await asyncio.sleep(self._policy.hang_s / 10)
            late = late + 1 if self.step_age_s() > self._hang_limit_s() else 0

    def _hang_limit_s(self) -> float:
        return self._policy.hang_limit_s(self._engine.step_s)
