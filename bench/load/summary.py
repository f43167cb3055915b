"""The summary of a run: what became of its requests under a promised latency.

Pure: values and arithmetic. Latency counts from the time at which a request was meant to be sent, so that a
server that makes its clients wait cannot hide it (Tene's "coordinated omission"). Whatever is not answered in
time is a miss, refusals included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ditserve.bench.load.adapters import DrawnWith
from ditserve.bench.load.workload import OfferedRequest, RequestKind

REFUSALS = (429, 503)
# A percentile q may be stated with 99 % confidence from this many answers on: 1 − q^n ≥ 0.99.
P99_NEEDS, P95_NEEDS = 459, 90
RESAMPLES = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its end; times in seconds from the start of the run. `status` 0: no answer at all."""

    request: OfferedRequest
    sent: float
    ended: float
    status: int
    drawn_with: DrawnWith | None = None

    @property
    def success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def latency(self) -> float:
        return self.ended - self.request.at

    @property
    def lag(self) -> float:
        """Seconds by which the generator sent the request late."""
        return self.sent - self.request.at


@dataclass(frozen=True, slots=True)
class Promise:
    """The promised latency of each kind of request: `factor` times its seconds on an idle server."""

    unloaded: Mapping[RequestKind, float]
    factor: float = 3.0

    def within(self, kind: RequestKind) -> float:
        return self.factor * self.unloaded[kind]


@dataclass(frozen=True, slots=True)
class RungQualities:
    """The measured quality of rungs, by name.

    `distance`: root mean square to the model's own long run. `real`: energy score against real pictures.
    `frechet`: Fréchet distance to real pictures. `grain`: that of flat areas, of 255.
    """

    distance: Mapping[str, float]
    frechet: Mapping[str, float]
    real: Mapping[str, float] = field(default_factory=dict)
    grain: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One run, or several runs pooled.

    Rates are per second. Latencies are in seconds from the intended start; a percentile is None where there
    are too few answers. `attainment_low` and `attainment_high` bound a 95 % bootstrap interval. `share_p99`
    is the 99th percentile of latency divided by promise, over all answers. `distance`, `frechet`, `real` and
    `grain` are means over the rungs of the images answered in time, as far as those were measured.
    """

    offered: int
    offered_per_s: float
    achieved_per_s: float
    goodput_per_s: float
    attainment: float
    attainment_low: float
    attainment_high: float
    p50: float | None
    p95: float | None
    p99: float | None
    share_p99: float | None
    refused: float
    failed: float
    steps: float
    degraded: float
    distance: float | None
    frechet: float | None
    lag_p99: float
    real: float | None = None
    grain: float | None = None

    @classmethod
    def of(
        cls, runs: Sequence[Sequence[Exchange]], promise: Promise, qualities: RungQualities
    ) -> LoadSummary:
        """Pool the `runs`, which hold one exchange at least."""
        exchanges = [exchange for run in runs for exchange in run]
        answered = [exchange for exchange in exchanges if exchange.success and exchange.drawn_with]
        in_time = [e for e in answered if e.latency <= promise.within(e.request.kind)]
        images = [exchange.drawn_with for exchange in in_time if exchange.drawn_with]
        latency = np.array([exchange.latency for exchange in answered])
        shares = np.array([e.latency / promise.within(e.request.kind) for e in answered])
        offered_s = sum(_offered_seconds([exchange.request.at for exchange in run]) for run in runs)
        busy_s = sum(max(e.ended for e in run) - min(e.request.at for e in run) for run in runs)
        low, high = _bootstrap_interval(len(in_time), len(exchanges))
        refused = sum(exchange.status in REFUSALS for exchange in exchanges)
        failed = sum(not e.success and e.status not in REFUSALS for e in exchanges)
        return cls(
            offered=len(exchanges),
            offered_per_s=len(exchanges) / offered_s if offered_s else float("inf"),
            achieved_per_s=len(answered) / busy_s,
            goodput_per_s=len(in_time) / busy_s,
            attainment=len(in_time) / len(exchanges),
            attainment_low=low,
            attainment_high=high,
            p50=_percentile(latency, 50, 1),
            p95=_percentile(latency, 95, P95_NEEDS),
            p99=_percentile(latency, 99, P99_NEEDS),
            share_p99=_percentile(shares, 99, 1),
            refused=refused / len(exchanges),
            failed=failed / len(exchanges),
            steps=_mean([image.steps for image in images]) or 0.0,
            degraded=_mean([image.degraded for image in images]) or 0.0,
            distance=_mean_quality(images, qualities.distance),
            frechet=_mean_quality(images, qualities.frechet),
            real=_mean_quality(images, qualities.real),
            grain=_mean_quality(images, qualities.grain),
            lag_p99=float(np.percentile([exchange.lag for exchange in exchanges], 99)),
        )


def _offered_seconds(times: Sequence[float]) -> float:
    """Return how long that many arrivals take at their own rate: n arrivals have only n − 1 gaps."""
    passed = max(times) - min(times)
    return passed * len(times) / (len(times) - 1) if len(times) > 1 else 0.0


def _percentile(values: Floats, percent: float, needs: int) -> float | None:
    return float(np.percentile(values, percent)) if len(values) >= needs else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _mean_quality(images: Sequence[DrawnWith], measured: Mapping[str, float]) -> float | None:
    return _mean([measured[image.rung] for image in images if image.rung in measured])


def _bootstrap_interval(in_time: int, count: int) -> tuple[float, float]:
    """Return a 95 % bootstrap interval of the share in time: resampled zeros and ones are a binomial."""
    means = np.random.default_rng(0).binomial(count, in_time / count, RESAMPLES) / count
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
