"""A rung: one operating point of a model. Pure."""

from __future__ import annotations

from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rung:
    """One operating point. `quality` is its measured distance to the reference sampler: 0 is as good, lower is better."""

    name: str
    solver: str
    steps: int
    grid: str
    guidance_interval: Interval
    quality: float
