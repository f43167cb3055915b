"""Caution: how far admission stretches predicted times, so that few promises are broken.

A prediction is a mean, and a mean is too short half of the time. How much longer it should be depends on the
machine and on its neighbours, and is learned from what became of the promises made. Pure: outcomes and times
are arguments.

Adaptive conformal inference (Gibbs and Candès 2021), which a kept promise lowers and a broken one raises, was
tried and is not used: a neighbour breaks promises by the dozen, and a hundred kept ones a second had the
margin forget him before he came back.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf

TOLERATED = 0.005  # share of broken promises that raises nothing
GAIN = 60.0  # by which a larger share raises the margin: at 2 % broken it rises by 0.9
MOST = 3.0  # the largest margin
CALM_S = 60.0  # in which what was observed falls to 1/e of its weight
KEPT_BEFORE = 20.0  # promises that count as kept before the first
FIRST_QUEUE_MARGIN = 2.0  # of a queue on a machine that is not known yet


@dataclass(slots=True)
class Caution:
    """The margins of admission, `least` or more.

    The margin is raised in proportion to the share of promises broken in the last minute. It depends on that
    share and not on how many promises there were, so that each of several processes learns the same.

    Example: the margin is 1.1. At one moment 960 promises are kept and 20 broken. With the 20 that count as
    kept before, 2 % of 1000 are broken, so the margin is 1.1 + 60 · (0.02 - 0.005) = 2.0. A minute later,
    with nothing observed, 7.4 of 381 are broken, and it is 1.97; after six minutes it is 1.1 again.
    """

    least: float
    _kept: float = 0.0
    _broken: float = 0.0
    _at: float = -inf
    _began_at: float = inf

    def margin(self, now: float) -> float:
        """Return how many times as long as predicted the work of a request may take."""
        weight = self._weight(now)
        broken = self._broken * weight
        share = broken / (KEPT_BEFORE + self._kept * weight + broken)
        return min(MOST, self.least + GAIN * max(0.0, share - TOLERATED))

    def queue_margin(self, now: float) -> float:
        """Return how many times as long as predicted the queue may take.

        It is larger on a machine that has not been watched for long: a long queue gains nothing but more
        promises that a slow moment breaks.
        """
        unknown = exp(-max(0.0, now - self._began_at) / CALM_S)
        return max(self.margin(now), self.least + (FIRST_QUEUE_MARGIN - self.least) * unknown)

    def observe(self, kept: int, broken: int, now: float) -> None:
        """Learn how many promises were kept and broken since the last time."""
        self._began_at = min(self._began_at, now)
        weight = self._weight(now)
        self._kept = self._kept * weight + kept
        self._broken = self._broken * weight + broken
        self._at = now

    def _weight(self, now: float) -> float:
        return exp(-max(0.0, now - self._at) / CALM_S)
