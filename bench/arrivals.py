"""Traffic to offer: who comes when, wanting how many steps. Drawn in advance from a seed, so every policy sees the same.

Pure: numpy's generators and arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]

BURSTINESS = 2.0  # coefficient of variation of the gaps of "bursts"
CROWD_HEIGHT, CROWD_SHARE = (
    4.0,
    0.3,
)  # a flash crowd: this many times the rate before it, bringing this share of all requests


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request for one image, at `at` seconds."""

    at: float
    steps: int
    consents: bool = True  # to fewer steps


def poisson(n: int, rate: float, random: np.random.Generator) -> Times:
    """Independent arrivals at `rate` a second."""
    return np.cumsum(random.exponential(1.0 / rate, n))


def bursts(n: int, rate: float, random: np.random.Generator) -> Times:
    """Gamma gaps with coefficient of variation `BURSTINESS`: crowds and silences, `rate` a second on average."""
    shape = BURSTINESS**-2
    return np.cumsum(random.gamma(shape, 1.0 / (rate * shape), n))


def flash(n: int, rate: float, random: np.random.Generator) -> Times:
    """Poisson at a calm rate but for a flash crowd in the middle; `rate` a second on average over the whole run."""
    calm = rate * (1.0 - CROWD_SHARE + CROWD_SHARE / CROWD_HEIGHT)
    gaps = random.exponential(1.0 / calm, n)
    start = int(n * (1.0 - CROWD_SHARE) / 2)
    gaps[start : start + int(n * CROWD_SHARE)] /= CROWD_HEIGHT
    return np.cumsum(gaps)


def at_once(n: int, rate: float, random: np.random.Generator) -> Times:
    """Everybody at time zero: the pattern in which batching by steps has least to offer."""
    del rate, random
    return np.zeros(n)


PROCESSES: Mapping[str, Callable[[int, float, np.random.Generator], Times]] = {
    "poisson": poisson,
    "bursts": bursts,
    "flash": flash,
    "at-once": at_once,
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Who asks for what: `mix` maps a count of steps to its share of the requests, `refusing` of which rule out fewer steps."""

    process: str = "poisson"
    mix: tuple[tuple[int, float], ...] = ((20, 0.7), (50, 0.3))
    refusing: float = 0.0

    @property
    def mean_steps(self) -> float:
        return sum(steps * share for steps, share in self.mix)

    def draw(self, n: int, rate: float, seed: int) -> Sequence[Arrival]:
        """`n` requests at `rate` a second on average."""
        random = np.random.default_rng(seed)
        times = PROCESSES[self.process](n, rate, random)
        wanted = random.choice([steps for steps, _ in self.mix], n, p=[share for _, share in self.mix])
        refuse = random.random(n) < self.refusing
        return [
            Arrival(float(at), int(steps), not no)
            for at, steps, no in zip(times, wanted, refuse, strict=True)
        ]
