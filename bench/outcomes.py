"""What a simulated run came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run, or the mean of several. Latencies are shares of the deadline; `plan_us` and `requests_per_s` are the
    simulation's own speed."""

    attainment: float
    goodput_per_s: float
    p50: float
    p95: float
    p99: float
    refused: float
    dropped: float  # accepted, but not answered by the deadline
    quality: float
    full_steps: float
    queue_peak: float
    plan_us: float
    requests_per_s: float

    @classmethod
    def mean(cls, outcomes: Sequence[Outcome]) -> Outcome:
        return cls(*(float(np.nanmean([getattr(o, f.name) for o in outcomes])) for f in fields(cls)))


@dataclass(frozen=True, slots=True)
class Point:
    """One arm under one load."""

    curve: str
    process: str
    load: float
    arm: str
    outcome: Outcome
