"""Demand by deadline: by when the steps of a sample must be taken, and what a worker says of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor, inf, log2

from ditserve.service.fleet import DemandBucket, WorkerState

BUCKETS_PER_OCTAVE = 2  # how finely the published demand tells dates apart
_NEAREST_S = 0.1  # all dates nearer than this share one bucket
_NEAREST = floor(BUCKETS_PER_OCTAVE * log2(_NEAREST_S))


@dataclass(frozen=True, slots=True)
class StepBucket:
    """The steps of one sample due in one interval: a `share` of all, the first of them due at `at`.

    `interval` numbers the interval by its distance from now, the nearest lowest; buckets of one interval add
    up.
    """

    interval: float
    at: float
    share: float


def demand_buckets(deadline: float, steps: int, now: float, pass_s: float) -> Iterator[StepBucket]:
    """Yield the steps of a sample by when they must be taken to end at `deadline`, the latest first.

    A sample takes its steps one after the other. The last is due at the deadline, and each step before it one
    pass sooner ("forced-forward demand", Baruah et al. 2009). By its deadline alone a long sample would seem
    to have time until it has none. Steps whose distance from now lies in one half octave share a bucket.

    Example: 50 steps are due in 10 s and a pass takes 0.1 s, so the steps are due in 5.1, 5.2, … 10.0 s. Half
    octaves begin at 4, 5.66 and 8 s. That makes three buckets: 21 steps due from 8.0 s on, 23 from 5.7 s on
    and 6 from 5.1 s on.
    """
    if deadline == inf:
        yield StepBucket(inf, inf, 1.0)
        return
    left, distance, interval = steps, deadline - now, inf
    while left:
        # At the edge of an interval rounding may leave the next step a hair inside it.
        interval = min(floor(BUCKETS_PER_OCTAVE * log2(max(distance, _NEAREST_S))), interval - 1)
        width = distance - 2.0 ** (interval / BUCKETS_PER_OCTAVE)
        count = left if interval == _NEAREST else min(left, 1 + floor(max(0.0, width) / pass_s))
        yield StepBucket(interval, now + distance - (count - 1) * pass_s, count / steps)
        left -= count
        distance -= count * pass_s


def demand_of(worker: WorkerState) -> tuple[DemandBucket, ...]:
    """Return the demand by deadline of a worker.

    The backlog of a worker that reports none counts as one bucket that is due first and cannot be degraded.
    """
    return worker.dues or (DemandBucket(-inf, worker.backlog_rows, worker.backlog_rows),)
