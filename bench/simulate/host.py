"""The simulated host: how fast the machine below a worker is, moment by moment.

A steady host has pace 1. On a noisy one neighbours come and go and whole seconds are lost: the pace jumps
among a few values and stays for times that are heavy-tailed, so that the past tells little. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

TAIL = 1.5  # exponent of the Pareto law of durations: the variance is infinite
LONGEST_S = 6.0


@dataclass(frozen=True, slots=True)
class Regime:
    """A pace that lasts `mean_s` seconds on average, and how often it comes among the others."""

    pace: float
    mean_s: float
    weight: float


STEADY = (Regime(1.0, inf, 1.0),)
# Full speed, the bursts of a neighbour that leaves a quarter, and stalls.
NOISY = (Regime(1.0, 0.8, 0.45), Regime(0.25, 0.8, 0.45), Regime(0.01, 0.25, 0.1))


def mean_pace(regimes: Sequence[Regime]) -> float:
    """Return the pace over a long time; the cut of the longest durations is left out of account."""
    if len(regimes) == 1:
        return regimes[0].pace
    seconds = [regime.mean_s * regime.weight for regime in regimes]
    return sum(r.pace * s for r, s in zip(regimes, seconds, strict=True)) / sum(seconds)


class SimulatedHost:
    """The pace of one host over time, drawn as it is asked for."""

    def __init__(self, regimes: Sequence[Regime], random: np.random.Generator) -> None:
        self._regimes, self._random = regimes, random
        weights = np.array([regime.weight for regime in regimes])
        self._shares = weights / weights.sum()
        self._ends: list[float] = []
        self._paces: list[float] = []

    def end_of(self, began: float, work_s: float) -> float:
        """Return when work of `work_s` seconds at pace 1 is done that begins at `began`."""
        at, left = began, work_s
        while True:
            pace, end = self._segment(at)
            if left <= (end - at) * pace:
                return at + left / pace
            left -= (end - at) * pace
            at = end

    def work(self, until: float) -> float:
        """Return the work that can be done until then, in seconds at pace 1."""
        at = done = 0.0
        while at < until:
            pace, end = self._segment(at)
            done += (min(end, until) - at) * pace
            at = end
        return done

    def _segment(self, at: float) -> tuple[float, float]:
        """Return the pace at a time, and until when it lasts."""
        while not self._ends or self._ends[-1] <= at:
            regime = self._regimes[self._random.choice(len(self._regimes), p=self._shares)]
            # A Pareto law of mean 1 with exponent a: (a - 1) / a times 1 + the Pareto of numpy.
            drawn = regime.mean_s * (TAIL - 1) / TAIL * (1.0 + float(self._random.pareto(TAIL)))
            longest = inf if regime.mean_s == inf else LONGEST_S
            self._ends.append((self._ends[-1] if self._ends else 0.0) + min(longest, drawn))
            self._paces.append(regime.pace)
        index = int(np.searchsorted(self._ends, at, side="right"))
        return self._paces[index], self._ends[index]
