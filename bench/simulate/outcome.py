"""The outcome of a simulated run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ditserve.bench.load.workload import Traffic
from ditserve.bench.simulate.fleet import SimulatedFleet
from ditserve.bench.simulate.sample import SimulatedSample
from ditserve.bench.simulate.scenario import SimulatedCluster, Strategy


@dataclass(frozen=True, slots=True)
class SimulationOutcome:
    """One run, or the mean of several.

    Latencies are shares of the deadline. `dropped` is the share that was accepted but not answered by its
    deadline. `plan_us` and `requests_per_s` are the speed of the simulation itself.
    """

    attainment: float
    goodput_per_s: float
    p50: float
    p95: float
    p99: float
    refused: float
    dropped: float
    quality: float
    full_steps: float
    queue_peak: float
    plan_us: float
    requests_per_s: float

    @classmethod
    def mean(cls, outcomes: Sequence[SimulationOutcome]) -> SimulationOutcome:
        return cls(*(float(np.nanmean([getattr(o, field.name) for o in outcomes])) for field in fields(cls)))


def offered_rate(cluster: SimulatedCluster, traffic: Traffic, load: float) -> float:
    """Return `load` times the most requests a second that the cluster can serve undegraded."""
    return load * cluster.curve.peak * cluster.workers / traffic.mean_rows


def simulate(
    strategy: Strategy, cluster: SimulatedCluster, traffic: Traffic, load: float, *, n: int, seed: int
) -> SimulationOutcome:
    """Offer `n` requests at a load and return what became of them."""
    fleet = SimulatedFleet(strategy, cluster, seed=seed)
    arrivals = traffic.draw(n, offered_rate(cluster, traffic, load), seed)
    began = time.thread_time()
    samples = fleet.run(arrivals)
    return _outcome(samples, fleet, time.thread_time() - began)


def _outcome(samples: Sequence[SimulatedSample], fleet: SimulatedFleet, seconds: float) -> SimulationOutcome:
    served = [sample for sample in samples if sample.finished is not None]
    latency = [((s.finished or 0.0) - s.arrived) / (s.due - s.arrived) for s in served]
    p50, p95, p99 = np.percentile(latency, (50, 95, 99)) if served else (np.nan,) * 3
    plan_seconds = [taken for worker in fleet.workers for taken in worker.plan_seconds]
    ended = max((sample.finished or sample.arrived for sample in samples), default=0.0)
    in_time = sum(sample.in_time for sample in samples)
    full_steps = [sample.taken >= sample.requested.steps for sample in served]
    return SimulationOutcome(
        attainment=in_time / len(samples),
        goodput_per_s=in_time / ended if ended else 0.0,
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        refused=float(np.mean([sample.rejected for sample in samples])),
        dropped=float(np.mean([not sample.rejected and not sample.in_time for sample in samples])),
        quality=float(np.mean([sample.quality for sample in served])) if served else np.nan,
        full_steps=float(np.mean(full_steps)) if served else np.nan,
        queue_peak=float(fleet.queue_peak),
        plan_us=1e6 * float(np.mean(plan_seconds)) if plan_seconds else 0.0,
        requests_per_s=len(samples) / seconds if seconds else np.inf,
    )
