"""The study of autoscaling: workers follow a daily curve by the figures that the service publishes.

The figures are the real ones: what every API's gate counts as asked for, and the backlog of the load
snapshot. A day is two hours here, which is harder than a real one: the load grows twelve times as fast, and
workers start no faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi

import numpy as np

from ditserve.bench.load.workload import Arrival, Traffic
from ditserve.bench.simulate.autoscaler import SYNC_S, THRESHOLD, WINDOW_S, Autoscaler
from ditserve.bench.simulate.fleet import SimulatedFleet, SimulatedWorker
from ditserve.bench.simulate.sample import SimulatedSample
from ditserve.bench.simulate.scenario import CURVES, LADDERS, PLANNED_EVERY_STEP, SimulatedCluster
from ditserve.service.planning.load import backlog_workers

DAY_S = 2 * 3600.0
LOW, HIGH = 0.4, 5.2  # of the day, in what one worker can do undegraded
MOST = 8  # workers
APIS = 3
START_S = 60.0  # from when a worker is wanted to its first claim


@dataclass(frozen=True, slots=True)
class ScalingOutcome:
    """One day under one signal.

    `worker_hours` count workers from when they are wanted. `changes` is how often the wanted number changed,
    `turns` how often it changed the other way than before; one is the day's own. `numbers` holds the workers
    that serve, by the hour.
    """

    signal: str
    requests: int
    attainment: float
    refused: float
    full_steps: float
    quality: float
    worker_hours: float
    most: int
    changes: int
    turns: int
    numbers: tuple[tuple[float, int], ...]

    def steps_of_numbers(self) -> list[tuple[float, float]]:
        """Return `numbers` as a line that is level between two changes."""
        points: list[tuple[float, float]] = [self.numbers[0]]
        for at, number in self.numbers[1:]:
            points += [(at, points[-1][1]), (at, number)]
        return points


@dataclass(frozen=True, slots=True)
class ScalingSignal:
    """A figure that workers follow: how many would be busy all the time. `first` are there from the start."""

    needed: Callable[[ScaledFleet, float], float]
    first: int = 1


class ScaledFleet(SimulatedFleet):
    """A fleet whose workers come and go."""

    def __init__(self, signal: ScalingSignal, *, seed: int) -> None:
        cluster = SimulatedCluster(CURVES["gpu"], LADDERS["ddim"], signal.first, apis=APIS)
        super().__init__(PLANNED_EVERY_STEP, cluster, seed=seed)
        self.autoscaler = Autoscaler(first=signal.first, most=MOST)
        self.wanted: list[tuple[float, int]] = [(0.0, signal.first)]
        self.numbers: list[tuple[float, int]] = [(0.0, signal.first)]
        self.offered: deque[tuple[float, float]] = deque([(0.0, 0.0)])  # all asked for so far, by time
        self._needed, self._ready_at, self._next_at = signal.needed, deque[float](), SYNC_S

    def _events(self, samples: list[SimulatedSample]) -> Iterator[tuple[float, int | None]]:
        for now, stepped in super()._events(samples):
            while self._next_at <= now:
                self._scale(self._next_at)
                self._next_at += SYNC_S
            yield now, stepped

    def _scale(self, now: float) -> None:
        while self._ready_at and self._ready_at[0] <= now:
            self._ready_at.popleft()
            self._start_worker()
        self.offered.append((now, sum(api.offered_s for api in self.apis)))
        while self.offered[0][0] < now - WINDOW_S:
            self.offered.popleft()
        wanted = self.autoscaler.decide(self._needed(self, now), now)
        if wanted != self.wanted[-1][1]:
            self.wanted.append((now, wanted))
        for _ in range(wanted - len(self.serving) - len(self._ready_at)):
            self._ready_at.append(now + START_S)
        for _ in range(len(self.serving) + len(self._ready_at) - wanted):
            self._stop_worker()
        if len(self.serving) != self.numbers[-1][1]:
            self.numbers.append((now, len(self.serving)))

    def _start_worker(self) -> None:
        index = len(self.workers)
        self.workers.append(SimulatedWorker(f"worker-{index}", self.strategy, self.cluster, self.hosts[0]))
        self._idle.add(index)

    def _stop_worker(self) -> None:
        """Tell one to leave: it hands back what it has not begun, and finishes the rest."""
        if self._ready_at:
            self._ready_at.pop()
            return
        worker = min(self.serving, key=lambda serving: len(serving.samples))
        worker.serving = False
        not_begun = [sample for sample in worker.samples if not sample.taken and sample not in worker.batch]
        worker.samples = [sample for sample in worker.samples if sample not in not_begun]
        for sample in not_begun:
            self._enqueue(sample)


def asked_for(fleet: ScaledFleet, now: float) -> float:
    """Return the workers that the two queries of the manifest count."""
    (first_at, first), (last_at, last) = fleet.offered[0], fleet.offered[-1]
    offered = (last - first) / max(SYNC_S, last_at - first_at)
    return max(offered, backlog_workers(fleet.load(now)))


def samples_held(fleet: ScaledFleet, now: float) -> float:
    """Return what was counted before: samples running and jobs waiting, by the rows that workers hold.

    It was a ratio to be multiplied by the number of workers that serve.
    """
    load = fleet.load(now)
    held = load.queued_jobs + sum(worker.running_samples for worker in load.workers)
    return held / sum(worker.max_rows for worker in load.workers) * len(load.workers)


def _always(workers: int) -> ScalingSignal:
    return ScalingSignal(lambda fleet, now: workers * THRESHOLD, workers)


SIGNALS: Mapping[str, ScalingSignal] = {
    "asked for and backlog": ScalingSignal(asked_for),
    "samples held (before)": ScalingSignal(samples_held),
    "always 4": _always(4),
    "always 8": _always(8),
}


def daily(seconds: float, seed: int, *, low: float, high: float) -> list[Arrival]:
    """Return Poisson arrivals over one day whose rate rises from `low` to `high` and falls again.

    The rates are multiples of what one worker can do.
    """
    traffic = Traffic()
    can_per_s = CURVES["gpu"].peak / traffic.mean_steps
    random = np.random.default_rng((seed, 2))
    peak = traffic.draw(int(high * can_per_s * seconds), high * can_per_s, seed)

    def share(at: float) -> float:
        return (low + (high - low) * (0.5 - 0.5 * cos(2 * pi * at / seconds))) / high

    return [arrival for arrival in peak if random.random() < share(arrival.at) and arrival.at < seconds]


def study_autoscaling(
    signal: str, *, seconds: float = DAY_S, low: float = LOW, high: float = HIGH, seed: int = 1
) -> ScalingOutcome:
    """Serve one day under a signal."""
    fleet = ScaledFleet(SIGNALS[signal], seed=seed)
    samples = fleet.run(daily(seconds, seed, low=low, high=high))
    served = [sample for sample in samples if sample.finished is not None]
    steps = [after - before for (_, before), (_, after) in pairwise(fleet.wanted)]
    ends = [at for at, _ in fleet.wanted[1:]] + [seconds]
    numbers = [*fleet.numbers, (seconds, fleet.numbers[-1][1])]
    return ScalingOutcome(
        signal=signal,
        requests=len(samples),
        attainment=sum(sample.in_time for sample in samples) / len(samples),
        refused=sum(sample.rejected for sample in samples) / len(samples),
        full_steps=sum(sample.taken >= sample.requested.steps for sample in served) / len(samples),
        quality=float(np.mean([sample.quality for sample in served])),
        worker_hours=sum(n * (end - at) for (at, n), end in zip(fleet.wanted, ends, strict=True)) / 3600,
        most=max(number for _, number in fleet.numbers),
        changes=len(steps),
        turns=sum((one > 0) != (other > 0) for one, other in pairwise(steps)),
        numbers=tuple((at / 3600, number) for at, number in numbers),
    )


def markdown(outcomes: Sequence[ScalingOutcome]) -> str:
    """Return the outcomes as a table."""
    lines = [
        "# Autoscaling in the simulator",
        "",
        "Made by `python -m bench.simulate --autoscaling`. The load goes from "
        f"{LOW:g} to {HIGH:g} times what one worker",
        f"can do undegraded and back in {DAY_S / 3600:g} h; {APIS} APIs, up to {MOST} workers that take "
        f"{START_S:g} s to start,",
        "the published GPU's step times, deadlines of three times the unloaded duration. KEDA and its",
        "HPA are as in deploy/kubernetes/autoscaling. Times are simulated: none depends on the machine.",
        "A turn is a change of the wanted number the other way than the one before; one is the day's.",
        "",
        "| signal | requests | in time, of all | refused | all steps, of all | mean distance | worker-hours"
        " | most workers | changes | turns |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for o in outcomes:
        shares = f"{o.attainment:.1%} | {o.refused:.1%} | {o.full_steps:.1%} | {o.quality:.2f}"
        counts = f"{o.worker_hours:.1f} | {o.most} | {o.changes} | {o.turns}"
        lines.append(f"| {o.signal} | {o.requests} | {shares} | {counts} |")
    return "\n".join(lines) + "\n"
