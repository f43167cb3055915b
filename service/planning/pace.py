"""Pace: how fast a machine works, in seconds of work a second, and how slow it may be for how long.

Work is counted in the seconds that it takes at speed 1, so a stall counts for as long as it lasts, where a
mean over passes would hardly see it. Pure: observations come in as arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp

STRETCH_S = 0.5  # the pace of every such stretch of work is remembered
KEPT = 120  # stretches: one minute
RARE = 0.05  # share of the times whose slowness counts as too rare to reckon with
SPELLS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # over which slowness is told
LEAST = 1e-3  # no machine is believed slower


@dataclass(slots=True)
class PaceWindow:
    """The work done per second of wall time, averaged over the last `window_s` seconds or `passes` passes.

    Example: in a window of 2 s at pace 1 a pass of 0.1 s takes 1 s. It weighs 1 - exp(-1 / 2) = 0.39 and its
    own pace is 0.1, so the pace becomes 0.61 + 0.39 · 0.1 = 0.65: a second of work is predicted to take
    1.5 s.
    """

    window_s: float
    passes: int
    pace: float = 1.0

    def observe(self, work_s: float, seconds: float, *, idle_s: float = 0.0) -> None:
        """Take in a pass of `work_s` seconds at speed 1 that took `seconds`, `idle_s` after the last."""
        window_s = max(self.window_s, self.passes * work_s / self.pace)
        weight = 1.0 - exp(-(seconds + idle_s) / window_s)
        self.pace += weight * (work_s / seconds - self.pace)


class PaceRecord:
    """The pace of each of the last `KEPT` stretches of `STRETCH_S` seconds of work.

    Example: of 40 stretches of half a second, four that follow one another had pace 0.25 and all others
    pace 1. Over 1 s, which is two stretches, the pace was 0.25 in 3 cases of 39, 0.63 in 2 and 1 in the other
    34. 5 % of 39 cases, rounded down, are 1. The pace is lower than 0.25 in no more, so 0.25 is the slow pace
    over 1 s.
    """

    def __init__(self) -> None:
        self._stretches: deque[float] = deque(maxlen=KEPT)  # the oldest first
        self._work_s = self._passed_s = 0.0  # of the stretch under way
        self._slow: tuple[tuple[float, float], ...] = ()

    def observe(self, work_s: float, seconds: float) -> None:
        """Take in a pass of `work_s` seconds at speed 1 that took `seconds`."""
        pace, left, ended = work_s / seconds, min(seconds, KEPT * STRETCH_S), False
        while left > 0.0:
            part = min(left, STRETCH_S - self._passed_s)
            left -= part
            self._work_s += pace * part
            self._passed_s += part
            if self._passed_s >= STRETCH_S:
                self._stretches.append(self._work_s / self._passed_s)
                self._work_s, self._passed_s, ended = 0.0, 0.0, True
        if ended:
            sums = list(accumulate(self._stretches, initial=0.0))
            self._slow = tuple((over_s, _slow_pace(sums, over_s)) for over_s in SPELLS_S)

    @property
    def slowest(self) -> float:
        """The lowest of the slow paces, 1 before any is known."""
        return min((pace for _, pace in self._slow), default=1.0)

    def slow(self) -> tuple[tuple[float, float], ...]:
        """Return for each of `SPELLS_S` the pace over so many seconds that was rarely undercut.

        Empty before the first stretch is over.
        """
        return self._slow


def _slow_pace(sums: Sequence[float], over_s: float) -> float:
    """Return the pace over `over_s` seconds by the sums of the paces of the first 0, 1, 2, … stretches."""
    length = min(round(over_s / STRETCH_S), len(sums) - 1)
    paces = sorted((after - before) / length for before, after in zip(sums, sums[length:], strict=False))
    return max(LEAST, paces[int(RARE * len(paces))])
