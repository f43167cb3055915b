"""A service in simulated time: one queue, several workers, the real scheduler and planner, and a cost curve for a machine.

Deterministic by seed; time passes only from event to event. The ways to run the service that are compared (`Arm`) differ in
nothing else.

What this settled: the planner sees the queue through claims ahead of need, 64 samples a worker, not through a summary. With rows
alone a summary cannot tell urgent work from patient work, and cutting for the latter is waste; with 64 samples at hand it
changes nothing any more. Claiming in the order of deadlines rather than of arrival, as the broker does among the jobs of one
caller, makes a deep queue safe as well.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from time import thread_time
from typing import Literal, get_args

import numpy as np

from ditserve.bench.arrivals import Arrival
from ditserve.bench.curves import Curve
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.jobs import LoadSnapshot, WorkerState
from ditserve.service.planning.admission import AdmissionRequest, admit
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.planning.planner import PlannedSample, Planner, Policy
from ditserve.service.rung import Rung

JITTER = 0.03  # relative spread of a step's duration
Order = Literal["arrival", "deadline"]
ORDERS: tuple[Order, ...] = get_args(Order)

WARM_UP = (1, 2, 4, 8, 16)  # batch sizes a worker times before it takes work


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the service."""

    name: str
    unit: Literal["request", "step"] = (
        "step"  # what a batch is made of: whole requests, or steps of whoever is there
    )
    order: Literal["fifo", "deadline"] = "deadline"
    cap: int | None = None  # rows of a batch; None: the cost model's choice
    admission: bool = True
    degrade: bool = True  # admission may take a request at a lower rung
    laxity: bool = True  # who has no time to lose goes first
    plan: bool = True  # what is claimed is planned anew at every step
    holds: int = 64  # samples a worker claims, running or not
    claims: Order = "deadline"  # the order of the queue
    summary: bool = True  # the planner is told of the rows still queued
    expire: bool = True  # what is past its deadline is dropped
    publish_s: float = 0.5  # how old a worker's published state may be


@dataclass(frozen=True, slots=True)
class Site:
    """What the service runs on, and what it promises: a deadline of `slo` times the unloaded duration."""

    curve: Curve
    ladder: Ladder
    workers: int = 1
    slo: float = 3.0


class Sample:
    """One request on its way; satisfies the scheduler's `Schedulable`."""

    def __init__(self, index: int, arrival: Arrival, asked: Rung, floor: Rung, due: float) -> None:
        self.id = str(index)
        self.arrived = self.added_at = arrival.at
        self.asked = self.rung = asked
        self.floor = floor
        self.due = due
        self.deadline_at: float | None = due
        self.remaining = asked.steps
        self.rows = 1
        self.steps = 0  # taken
        self.noise = 1.0  # share of the way still to go
        self.quality = 0.0  # of the way so far: each rung's, weighted with the share walked on it
        self.finished: float | None = None
        self.rejected = False
        self.consents = arrival.consents

    @property
    def least_steps(self) -> int:
        return min(self.remaining, steps_left(self.remaining, self.rung, self.floor))

    @property
    def kept(self) -> bool:
        return self.finished is not None and self.finished <= self.due

    def move(self, rung: Rung) -> None:
        self.remaining = steps_left(self.remaining, self.rung, rung)
        self.rung = rung

    def walk(self) -> None:
        share = self.noise / self.remaining
        self.quality += share * self.rung.quality
        self.noise -= share
        self.remaining -= 1
        self.steps += 1

    def planned(self, last: int) -> PlannedSample:
        return PlannedSample(
            id=self.id,
            deadline_at=self.deadline_at,
            rung=self.rung,
            remaining_steps=self.remaining,
            guided=False,
            floor_steps=1,
            allow_degraded=self.consents,
            started=self.steps > 0,
            timestep=ceil(self.noise * last),
            requested=self.asked,
        )


class Worker:
    """The engine's loop without the network: plan, batch, wait out the curve, advance."""

    def __init__(self, name: str, arm: Arm, site: Site) -> None:
        self.name, self.arm, self.site = name, arm, site
        self.samples: list[Sample] = []
        self.batch: tuple[Sample, ...] = ()
        self.costs = CostModel()
        for rows in WARM_UP:
            self.costs.observe(rows, site.curve.seconds(rows))
        self.planner = Planner(site.ladder)
        self.scheduler = Scheduler(max_rows=site.curve.max_rows)
        self.plan_seconds: list[float] = []
        self.state = self._state(0.0)

    @property
    def saturation_rows(self) -> int:
        return self.arm.cap or self.costs.saturation_rows(self.site.curve.max_rows)

    @property
    def room(self) -> int:
        return max(0, self.arm.holds - len(self.samples))

    def start(self, now: float, queued_rows: int, random: np.random.Generator) -> float | None:
        """Choose the next batch; the time at which its step ends, None with nothing to do."""
        if self.arm.expire:
            self.samples = [sample for sample in self.samples if sample.due > now]
        if self.arm.plan and self.samples:
            self._plan(now, queued_rows)
        if not self.samples or now - self.state.updated_at >= self.arm.publish_s:
            self.state = self._state(now)
        if not self.samples:
            self.batch = ()
            return None
        pass_s = self.costs.predict if self.arm.laxity else _instant
        self.batch = self.scheduler.next_batch(
            self.samples, self.saturation_rows, now=now, seconds=pass_s
        ).samples
        seconds = self.site.curve.seconds(len(self.batch)) * float(random.lognormal(0.0, JITTER))
        self.costs.observe(len(self.batch), seconds)
        return now + seconds

    def advance(self, now: float) -> None:
        for sample in self.batch:
            sample.walk()
            if not sample.remaining:
                sample.finished = now
        self.samples = [sample for sample in self.samples if sample.finished is None]

    def _plan(self, now: float, queued_rows: int) -> None:
        by_id = {sample.id: sample for sample in self.samples}
        planned = self._planned()
        begin = thread_time()
        changes = self.planner.plan(
            planned,
            now,
            self.costs,
            max_rows=self.site.curve.max_rows,
            queued_rows=queued_rows if self.arm.summary else 0,
        )
        self.plan_seconds.append(thread_time() - begin)
        for change in changes:
            by_id[change.sample_id].move(change.rung)

    def _state(self, now: float) -> WorkerState:
        return WorkerState(
            worker=self.name,
            models=("simulated",),
            max_rows=self.site.curve.max_rows,
            step_fixed_s=self.costs.fixed_s,
            step_per_row_s=self.costs.per_row_s,
            decode_s=0.0,
            running_samples=len(self.samples),
            backlog_rows=sum(sample.remaining for sample in self.samples),
            last_step_age_s=0.0,
            updated_at=now,
            dues=self.planner.demand(self._planned(), now, self.costs, max_rows=self.site.curve.max_rows),
        )

    def _planned(self) -> list[PlannedSample]:
        last = self.site.ladder.timesteps - 1
        return [sample.planned(last) for sample in self.samples]


def _instant(rows: int) -> float:
    """Of passes that take no time: samples then go by their deadlines alone."""
    return 0.0


class Fleet:
    """The whole service: arrivals are admitted to one queue, from which free workers claim."""

    def __init__(self, arm: Arm, site: Site, *, seed: int = 0) -> None:
        self.arm, self.site = arm, site
        self.random = np.random.default_rng(seed)
        self.workers = [Worker(f"worker-{index}", arm, site) for index in range(site.workers)]
        self.queue: deque[Sample] = deque()  # in the order of claims
        self.queued_rows = self.queue_peak = 0
        self._ends: list[tuple[float, int]] = []  # when each busy worker's step ends

    def run(self, arrivals: Sequence[Arrival]) -> list[Sample]:
        """Serve everybody; the samples in order of arrival."""
        samples = [self._sample(index, arrival) for index, arrival in enumerate(arrivals)]
        idle = set(range(len(self.workers)))
        for now, woken in self._events(samples):
            if woken is not None:
                self.workers[woken].advance(now)
                idle.add(woken)
            for index in sorted(idle, key=lambda each: len(self.workers[each].samples)):
                worker = self.workers[index]
                self._claim(worker, now)
                end = worker.start(now, self.queued_rows // len(self.workers), self.random)
                if end is not None:
                    heapq.heappush(self._ends, (end, index))
                    idle.discard(index)
        return samples

    def _events(self, samples: list[Sample]) -> Iterator[tuple[float, int | None]]:
        """Times at which something is to be done, and the worker whose step ended then (None: somebody came)."""
        coming = deque(samples)
        while coming or self._ends:
            if coming and (not self._ends or coming[0].arrived <= self._ends[0][0]):
                sample = coming.popleft()
                if self._admit(sample, sample.arrived):
                    self._enqueue(sample)
                yield sample.arrived, None
            else:
                end, index = heapq.heappop(self._ends)
                yield end, index

    def _sample(self, index: int, arrival: Arrival) -> Sample:
        asked = self.site.ladder.requested("ddim", arrival.steps, "leading", (0.0, 1.0), False)
        due = arrival.at + self.site.slo * arrival.steps * self.site.curve.seconds(1)
        # Where nothing is planned anew nothing is cut once it is accepted.
        floor = self.site.ladder.lowest(asked, 1) if self.arm.plan and arrival.consents else asked
        sample = Sample(index, arrival, asked, floor, due)
        if self.arm.order == "fifo":
            sample.deadline_at = None
        return sample

    def _admit(self, sample: Sample, now: float) -> bool:
        if not self.arm.admission:
            return True
        load = LoadSnapshot(
            queued_jobs=len(self.queue),
            queued_rows=self.queued_rows,
            oldest_age_s=now - self.queue[0].arrived if self.queue else 0.0,
            workers=tuple(worker.state for worker in self.workers),
            taken_at=now,
        )
        admission_request = AdmissionRequest(
            rung=sample.asked,
            guidance_scale=1.0,
            samples=1,
            deadline_at=sample.due,
            allow_degraded=self.arm.degrade and sample.consents,
            min_steps=1,
        )
        policy = Policy(recut=self.arm.plan)
        answer = admit(admission_request, load, ladder=self.site.ladder, now=now, policy=policy)
        sample.rejected = not answer.accepted
        sample.move(answer.rung)
        return answer.accepted

    def _enqueue(self, sample: Sample) -> None:
        self.queued_rows += sample.remaining
        self.queue_peak = max(self.queue_peak, len(self.queue) + 1)
        if self.arm.claims == "arrival":
            self.queue.append(sample)
        else:
            insort(self.queue, sample, key=lambda each: each.due)

    def _claim(self, worker: Worker, now: float) -> None:
        """Hand the worker what it has room for, in the order of the queue."""
        claimed = self._same_steps(worker) if self.arm.unit == "request" else worker.room
        for _ in range(min(claimed, len(self.queue))):
            sample = self.queue.popleft()
            self.queued_rows -= sample.remaining
            if not self.arm.expire or sample.due > now:
                worker.samples.append(sample)

    def _same_steps(self, worker: Worker) -> int:
        """Bring the next requests with as many steps as the first to the front; how many fit in one batch."""
        if worker.samples or not self.queue:
            return 0
        steps = self.queue[0].asked.steps
        batch = list(
            islice((sample for sample in self.queue if sample.asked.steps == steps), worker.saturation_rows)
        )
        chosen = set(map(id, batch))
        rest = [sample for sample in self.queue if id(sample) not in chosen]
        self.queue = deque([*batch, *rest])
        return len(batch)
