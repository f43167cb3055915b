"""Requests to offer: when each comes, and what it asks for. Drawn in advance from a seed, so every server is asked the same.

Pure: numpy's generators and arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ditserve.bench.arrivals import Traffic

STEPS = ((20, 0.7), (50, 0.3))


@dataclass(frozen=True, slots=True)
class Kind:
    """What the work of a request depends on."""

    steps: int
    guided: bool

    @property
    def rows(self) -> int:
        return self.steps * (2 if self.guided else 1)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for one image of class `label`, wanted at `at` seconds."""

    at: float
    kind: Kind
    label: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """`mix` maps counts of steps to shares, `guided` of the requests are guided, classes are drawn with p ∝ 1 / rank^`zipf`."""

    classes: int
    process: str = "poisson"
    mix: tuple[tuple[int, float], ...] = STEPS
    guided: float = 0.7
    zipf: float = 1.0

    @property
    def kinds(self) -> Mapping[Kind, float]:
        """Every kind of request with its share."""
        each = {Kind(steps, True): share * self.guided for steps, share in self.mix}
        each |= {Kind(steps, False): share * (1.0 - self.guided) for steps, share in self.mix}
        return {kind: share for kind, share in each.items() if share > 0.0}

    def draw(self, n: int, rate: float, seed: int) -> tuple[Asked, ...]:
        """`n` requests at `rate` a second on average."""
        arrivals = Traffic(self.process, self.mix).draw(n, rate, seed)
        random = np.random.default_rng((seed, 1))  # arrivals are the same with any guidance and classes
        guided = random.random(n) < self.guided
        weights = np.arange(1, self.classes + 1) ** -self.zipf
        labels = random.choice(self.classes, n, p=weights / weights.sum())
        return tuple(
            Asked(arrival.at, Kind(arrival.steps, bool(twice)), int(label), 1000 * seed + k)
            for k, (arrival, twice, label) in enumerate(zip(arrivals, guided, labels, strict=True))
        )
