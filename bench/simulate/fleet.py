"""The simulated service: the real scheduler, planner and admission in simulated time.

Time passes from event to event, with the step times of a `StepTimeCurve`, and a seed decides everything.
Strategies differ in nothing but their `Strategy`.

What this decided for the real service: the planner sees the queue through claims ahead of need and not
through a summary. A summary that gives rows alone cannot tell urgent work from patient work, and degrading
samples for the latter is waste. Claiming in the order of deadlines instead of arrival, as the broker does
among the jobs of one caller, keeps a deep queue safe as well.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil, inf
from time import thread_time

import numpy as np

from ditserve.bench.load.workload import Arrival
from ditserve.bench.simulate.api import SimulatedApi
from ditserve.bench.simulate.host import SimulatedHost
from ditserve.bench.simulate.sample import RowsKind, SimulatedSample
from ditserve.bench.simulate.scenario import SimulatedCluster, Strategy
from ditserve.service.engine.scheduler import Candidates, Scheduler
from ditserve.service.fleet import LoadSnapshot, WorkerState
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.admission import AdmissionRequest
from ditserve.service.planning.capacity import backlog_time
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.planner import PlannedSample, Planner, Policy
from ditserve.service.rung import Consent
from ditserve.service.worker.room import wanted_rows

SLOTS = 64  # samples that a worker can hold
BALANCE_S = WorkerPolicy().balance_s
WORKERS_A_HOST = 2
RETURNS = 10  # how often a client comes back
PUBLISH_S = 0.5  # the greatest age of a worker's published state
JITTER = 0.03  # relative spread of the seconds of a step
WARM_UP_ROWS = (1, 2, 4, 8, 16)  # batch sizes that a worker times before it takes work


class SimulatedWorker:
    """The engine's loop without the network: plan, choose a batch, let time pass, advance samples."""

    def __init__(self, name: str, strategy: Strategy, cluster: SimulatedCluster, host: SimulatedHost) -> None:
        self.name, self.strategy, self.cluster, self.host = name, strategy, cluster, host
        self.serving = True  # until it is told to leave
        self.unreported_rows = 0  # claimed since the last report
        self._step_began = 0.0
        self._rows_kind = RowsKind()  # of the step under way
        self.samples: list[SimulatedSample] = []
        self.batch: tuple[SimulatedSample, ...] = ()
        self.costs = CostModel()
        for rows in WARM_UP_ROWS:
            self.costs.observe(rows, cluster.curve.seconds(rows))
        self._costs_of = {RowsKind(): self.costs}
        self.planner = Planner(cluster.ladder)
        self.scheduler = Scheduler(max_rows=cluster.curve.max_rows)
        self.plan_seconds: list[float] = []
        self.state = self._published_state(0.0)

    @property
    def max_batch(self) -> int:
        return self.strategy.cap or self.costs.saturation_rows(self.cluster.curve.max_rows)

    def report(self, now: float) -> WorkerState:
        """Return its last report, which is a new one where it is idle."""
        if not self.samples:
            self.state = self._published_state(now)
        return self.state

    @property
    def backlog_s(self) -> float:
        """The seconds of its work, by its last report."""
        return backlog_time(self.state)

    def start_step(self, now: float, queued_rows: int, random: np.random.Generator) -> float | None:
        """Choose the next batch; return the time at which its step ends, None if there is nothing to do."""
        if self.strategy.expire:
            self.samples = [sample for sample in self.samples if sample.due > now]
        if self.strategy.plan and self.samples:
            self._plan(now, queued_rows)
        if not self.samples or now - self.state.updated_at >= PUBLISH_S:
            self.state = self._published_state(now)
        if not self.samples:
            self.batch = ()
            return None
        groups: dict[RowsKind, list[SimulatedSample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.rows_kind, []).append(sample)
        candidates = [self._candidates(kind, samples) for kind, samples in groups.items()]
        batch = self.scheduler.next_batch(candidates, now=now)
        self.batch = batch.samples
        self._rows_kind = kind = self.batch[0].rows_kind
        work_s = kind.backbone_cost * self.cluster.curve.seconds(kind.tokens * len(self.batch))
        work_s *= float(random.lognormal(0.0, JITTER))
        self._step_began = now
        return self.host.end_of(now, work_s)

    def finish_step(self, now: float) -> None:
        self._costs_of[self._rows_kind].observe(len(self.batch), now - self._step_began)
        for sample in self.batch:
            sample.take_step()
            if not sample.remaining:
                sample.finished = now
        self.samples = [sample for sample in self.samples if sample.finished is None]

    def _candidates(self, kind: RowsKind, samples: Sequence[SimulatedSample]) -> Candidates[SimulatedSample]:
        """Return the samples whose rows are of one kind, as the scheduler sees a group of them."""
        if kind not in self._costs_of:
            self._costs_of[kind] = self.costs.scaled(kind.row_cost)
        costs = self._costs_of[kind]
        return Candidates(
            samples,
            self.strategy.cap or costs.saturation_rows(self.scheduler.cap(kind.tokens)),
            costs.predict,
            row_cost=kind.row_cost,
            size=kind,
        )

    def _plan(self, now: float, queued_rows: int) -> None:
        by_id = {sample.id: sample for sample in self.samples}
        planned = self._planned_samples()
        began = thread_time()
        changes = self.planner.plan(
            planned,
            now,
            self.costs,
            max_rows=self.cluster.curve.max_rows,
            queued_rows=queued_rows,
        )
        self.plan_seconds.append(thread_time() - began)
        for change in changes:
            by_id[change.sample_id].change_rung(change.rung)

    def _published_state(self, now: float) -> WorkerState:
        self.unreported_rows = 0
        max_rows, batch_rows = self.cluster.curve.max_rows, self.max_batch
        fixed_s, per_row_s = self.costs.line(batch_rows)
        return WorkerState(
            worker=self.name,
            models=("simulated",),
            max_rows=max_rows,
            step_fixed_s=fixed_s,
            step_per_row_s=per_row_s,
            decode_s=0.0,
            running_samples=len(self.samples),
            backlog_rows=ceil(sum(sample.rows_left(self.cluster.ladder) for sample in self.samples)),
            last_step_age_s=0.0,
            updated_at=now,
            dues=self.planner.demand(self._planned_samples(), now, self.costs, max_rows=max_rows),
            slow=self.costs.slow_spells(),
            batch_rows=batch_rows,
        )

    def _planned_samples(self) -> list[PlannedSample]:
        return [sample.for_planner() for sample in self.samples]


class SimulatedFleet:
    """The whole service: admission puts arrivals into one queue, and workers with room claim them."""

    def __init__(self, strategy: Strategy, cluster: SimulatedCluster, *, seed: int = 0) -> None:
        self.strategy, self.cluster = strategy, cluster
        self.random = np.random.default_rng(seed)
        self.hosts = [
            SimulatedHost(cluster.regimes, np.random.default_rng((seed, index)))
            for index in range(-(-cluster.workers // WORKERS_A_HOST))
        ]
        self.workers = [
            SimulatedWorker(f"worker-{index}", strategy, cluster, self.hosts[index // WORKERS_A_HOST])
            for index in range(cluster.workers)
        ]
        self._idle = set(range(len(self.workers)))
        policy = Policy(recut=strategy.plan)
        self.apis = [SimulatedApi(cluster.ladder, policy, self.load) for _ in range(cluster.apis)]
        self.kept = self.broken = 0  # promises
        self.queue: deque[SimulatedSample] = deque()  # in the order of claims
        self.queued_rows = self.queue_peak = 0
        self._step_ends: list[tuple[float, int]] = []  # a heap of (time, index of the busy worker)
        self._promised: list[tuple[float, str, SimulatedSample]] = []  # a heap of the accepted by deadline

    def run(self, arrivals: Sequence[Arrival]) -> list[SimulatedSample]:
        """Serve all arrivals; return their samples in order of arrival."""
        samples = [self._sample(index, arrival) for index, arrival in enumerate(arrivals)]
        for now, stepped in self._events(samples):
            if stepped is not None:
                self.workers[stepped].finish_step(now)
                self._idle.add(stepped)
                self._observe_ends(now)
            # With nothing to claim, all others that are idle stay so.
            woken = self._idle if self.queue or stepped is None else {stepped}
            for index in sorted(woken, key=lambda worker: (len(self.workers[worker].samples), worker)):
                worker = self.workers[index]
                if self.queue and worker.serving:
                    self._claim(worker, now)
                if not worker.samples and index != stepped:
                    continue
                end = worker.start_step(now, self.queued_rows // len(self.serving), self.random)
                if end is not None:
                    heapq.heappush(self._step_ends, (end, index))
                    self._idle.discard(index)
        return samples

    @property
    def serving(self) -> list[SimulatedWorker]:
        """The workers that claim."""
        return [worker for worker in self.workers if worker.serving]

    def _events(self, samples: list[SimulatedSample]) -> Iterator[tuple[float, int | None]]:
        """Yield the time of each event, and the worker whose step ended then, or None for an arrival."""
        coming = [(sample.arrived, index, sample) for index, sample in enumerate(samples)]
        heapq.heapify(coming)
        while coming or self._step_ends:
            if coming and (not self._step_ends or coming[0][0] <= self._step_ends[0][0]):
                now, index, sample = heapq.heappop(coming)
                if self._admit(sample, now):
                    self._enqueue(sample)
                elif sample.retry_at is not None:
                    heapq.heappush(coming, (sample.retry_at, index, sample))
                yield now, None
            else:
                yield heapq.heappop(self._step_ends)

    def _observe_ends(self, now: float) -> None:
        """Count the promises that were kept and those that were broken since the last step."""
        while self._promised and (self._promised[0][0] <= now or self._promised[0][2].finished is not None):
            *_, sample = heapq.heappop(self._promised)
            self.kept += sample.in_time
            self.broken += not sample.in_time

    def _sample(self, index: int, arrival: Arrival) -> SimulatedSample:
        ladder = self.cluster.ladder
        requested = ladder.requested("ddim", arrival.steps, "leading", (0.0, 1.0), False)
        alone_s = arrival.steps * self.cluster.curve.seconds(arrival.row_cost)
        due = arrival.at + self.cluster.slo * alone_s
        # Only a strategy that plans at every step can lower a sample once it is accepted.
        can_be_lowered = self.strategy.plan and arrival.consents
        floor = ladder.lowest(requested, Consent()) if can_be_lowered else requested
        sample = SimulatedSample(index, arrival, requested, floor, due)
        if self.strategy.order == "fifo":
            sample.deadline_at = None
        return sample

    def _admit(self, sample: SimulatedSample, now: float) -> bool:
        if not self.strategy.admission:
            return True
        if sample.came_back:
            sample.due = now + sample.within_s
            sample.deadline_at = None if sample.deadline_at is None else sample.due
        admission_request = AdmissionRequest(
            rung=sample.requested,
            guidance_scale=1.0,
            samples=1,
            deadline_at=sample.due,
            allow_degraded=self.strategy.degrade and sample.consents,
            consent=Consent(),
            row_cost=sample.row_cost,
        )
        # Each client stays with one process.
        api = self.apis[int(sample.id) % len(self.apis)]
        answer = api.admit(admission_request, sender=sample.id, now=now)
        sample.rejected = not answer.accepted
        sample.retry_at = None
        sample.taken_on_return |= sample.came_back == 1 and answer.accepted
        if answer.accepted:
            heapq.heappush(self._promised, (sample.due, sample.id, sample))
        elif self.cluster.returning and answer.retry_after_s is not None and sample.came_back < RETURNS:
            sample.came_back += 1
            sample.retry_at = now + answer.retry_after_s
        sample.change_rung(answer.rung)
        return answer.accepted

    def load(self, now: float) -> LoadSnapshot:
        return LoadSnapshot(
            queued_jobs=len(self.queue),
            queued_rows=self.queued_rows + sum(worker.unreported_rows for worker in self.workers),
            oldest_age_s=now - self.queue[0].arrived if self.queue else 0.0,
            workers=tuple(worker.report(now) for worker in self.serving),
            taken_at=now,
            kept=self.kept,
            broken=self.broken,
        )

    def _enqueue(self, sample: SimulatedSample) -> None:
        sample.queued_rows = ceil(sample.rows_left(self.cluster.ladder))
        self.queued_rows += sample.queued_rows
        self.queue_peak = max(self.queue_peak, len(self.queue) + 1)
        if self.strategy.claims == "arrival":
            self.queue.append(sample)
        else:
            insort(self.queue, sample, key=lambda queued: queued.due)

    def _claim(self, worker: SimulatedWorker, now: float) -> None:
        """Give the worker the samples it has room for, in the order of the queue."""
        room = self._request_batch(worker) if self.strategy.unit == "request" else self._room(worker)
        for _ in range(min(room, len(self.queue))):
            sample = self.queue.popleft()
            self.queued_rows -= sample.queued_rows
            worker.unreported_rows += sample.queued_rows
            if not self.strategy.expire or sample.due > now:
                worker.samples.append(sample)

    def _room(self, worker: SimulatedWorker) -> int:
        """Return how many samples a worker claims, by the rule of the real one."""
        others = [other.backlog_s for other in self.serving if other is not worker]
        wanted = wanted_rows(
            worker.max_batch,
            lookahead_rows=self.strategy.lookahead,
            peers=len(self.serving),
            ahead_s=worker.backlog_s - min(others, default=inf),
            balance_s=BALANCE_S,
        )
        return max(0, min(SLOTS, wanted) - len(worker.samples))

    def _request_batch(self, worker: SimulatedWorker) -> int:
        """Bring requests with as many steps as the first to the front; return how many fit a batch."""
        if worker.samples or not self.queue:
            return 0
        steps = self.queue[0].requested.steps
        alike = (sample for sample in self.queue if sample.requested.steps == steps)
        batch = list(islice(alike, worker.max_batch))
        chosen = set(map(id, batch))
        rest = [sample for sample in self.queue if id(sample) not in chosen]
        self.queue = deque([*batch, *rest])
        return len(batch)
