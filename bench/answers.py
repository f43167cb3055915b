"""What became of the requests of a run, and what that is worth under a promised latency.

Pure: values and arithmetic. Latency counts from when a request was meant to be sent, so that a server which makes its clients wait
cannot hide it (Tene's "coordinated omission"); whatever is not answered in time is a miss, refusals included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ditserve.bench.adapters import Told
from ditserve.bench.workload import Asked, Kind

REFUSALS = (429, 503)
P99_NEEDS, P95_NEEDS = 459, 90  # answers from which a percentile may be told with 99 % confidence (1 − q^n)
RESAMPLES = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its end; times in seconds from the start of the run. `status` 0: no answer at all."""

    asked: Asked
    sent: float
    ended: float
    status: int
    told: Told | None = None

    @property
    def latency(self) -> float:
        return self.ended - self.asked.at

    @property
    def lag(self) -> float:
        return self.sent - self.asked.at


@dataclass(frozen=True, slots=True)
class Promise:
    """Seconds within which each kind of request must be answered: `factor` times its unloaded latency."""

    unloaded: Mapping[Kind, float]
    factor: float = 3.0

    def within(self, kind: Kind) -> float:
        return self.factor * self.unloaded[kind]


@dataclass(frozen=True, slots=True)
class Summary:
    """One run, or several together. Rates per second, latencies in seconds from the intended start; a percentile is None where there are too few
    answers to tell it. `frechet` and `distance` are means of the rungs used, over what was answered in time."""

    offered: int
    offered_per_s: float
    achieved_per_s: float
    goodput_per_s: float
    attainment: float
    attainment_low: float  # of a 95 % bootstrap interval
    attainment_high: float
    p50: float | None
    p95: float | None
    p99: float | None
    share_p99: float | None  # of its promise, over whatever was answered
    refused: float
    failed: float
    steps: float
    degraded: float
    distance: float | None
    frechet: float | None
    lag_p99: float

    @classmethod
    def of(
        cls,
        runs: Sequence[Sequence[Exchange]],
        promise: Promise,
        *,
        distance: Mapping[str, float],
        frechet: Mapping[str, float],
    ) -> Summary:
        """`runs` hold one exchange at least."""
        every = [each for run in runs for each in run]
        done = [each for each in every if 200 <= each.status < 300 and each.told is not None]
        kept = [each for each in done if each.latency <= promise.within(each.asked.kind)]
        told = [each.told for each in kept if each.told is not None]
        latency = np.array([each.latency for each in done])
        shares = np.array([each.latency / promise.within(each.asked.kind) for each in done])
        offered_s = sum(_span([each.asked.at for each in run]) for run in runs)
        busy_s = sum(max(each.ended for each in run) - min(each.asked.at for each in run) for run in runs)
        low, high = _interval(len(kept), len(every))
        return cls(
            offered=len(every),
            offered_per_s=len(every) / offered_s if offered_s else float("inf"),
            achieved_per_s=len(done) / busy_s,
            goodput_per_s=len(kept) / busy_s,
            attainment=len(kept) / len(every),
            attainment_low=low,
            attainment_high=high,
            p50=_percentile(latency, 50, 1),
            p95=_percentile(latency, 95, P95_NEEDS),
            p99=_percentile(latency, 99, P99_NEEDS),
            share_p99=_percentile(shares, 99, 1),
            refused=sum(each.status in REFUSALS for each in every) / len(every),
            failed=sum(not 200 <= each.status < 300 and each.status not in REFUSALS for each in every)
            / len(every),
            steps=_mean([each.steps for each in told]) or 0.0,
            degraded=_mean([each.degraded for each in told]) or 0.0,
            distance=_mean([distance[each.rung] for each in told if each.rung in distance]),
            frechet=_mean([frechet[each.rung] for each in told if each.rung in frechet]),
            lag_p99=float(np.percentile([each.lag for each in every], 99)),
        )


def _span(times: Sequence[float]) -> float:
    """How long so many arrivals take at their own rate."""
    passed = max(times) - min(times)
    return passed * len(times) / (len(times) - 1) if len(times) > 1 else 0.0


def _percentile(values: Floats, percent: float, needs: int) -> float | None:
    return float(np.percentile(values, percent)) if len(values) >= needs else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _interval(kept: int, of: int) -> tuple[float, float]:
    """A 95 % bootstrap interval of the share kept: zeros and ones drawn anew are a binomial."""
    means = np.random.default_rng(0).binomial(of, kept / of, RESAMPLES) / of
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
