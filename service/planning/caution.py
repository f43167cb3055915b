"""Caution: how far admission stretches predicted times, so that few promises are broken.

A prediction is a mean, and a mean is too short half of the time. How much longer it should be depends on the
machine and on its neighbours, and is learned from what became of the promises made: adaptive conformal
inference (Gibbs and Candès 2021). Pure: outcomes and times are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf

TARGET = 0.02  # share of the accepted that may miss their deadline
RATE = 0.1  # by which a broken promise raises the margin
MOST = 3.0  # the largest margin
CALM_S = 60.0  # in which a raised margin falls to 1/e of its rise, whatever is observed


@dataclass(slots=True)
class Caution:
    """The margin of admission, `least` or more.

    A broken promise raises it by `RATE` · (1 - `TARGET`), a kept one lowers it by `RATE` · `TARGET`, so it
    rests where a share `TARGET` is broken. It also falls with time: a margin at which nothing is accepted
    could learn nothing.

    Example: the margin is 1.1. Two broken promises make it 1.296. After 49 kept ones it is 1.198, and a
    minute later, with nothing observed, 1.136.
    """

    least: float
    _raised: float = 0.0
    _at: float = -inf

    def margin(self, now: float) -> float:
        return self.least + self._raised_at(now)

    def observe(self, kept: bool, now: float) -> None:
        """Learn whether a promise was kept."""
        raised = self._raised_at(now) + RATE * (float(not kept) - TARGET)
        self._raised, self._at = min(max(0.0, raised), MOST - self.least), now

    def _raised_at(self, now: float) -> float:
        return self._raised * exp(-max(0.0, now - self._at) / CALM_S)
