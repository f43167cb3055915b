"""The autoscaler of Kubernetes as the manifests configure it: KEDA's queries, and the steps of its HPA.

What `deploy/kubernetes/autoscaling` says is repeated here, and a test compares. Pure: times and figures are
arguments.
"""

from __future__ import annotations

from collections import deque
from math import ceil

THRESHOLD = 0.7
WINDOW_S = 60.0  # of the rate of what is asked for
SYNC_S = 15.0  # between two decisions
TOLERANCE = 0.1  # relative to the present number, within which nothing changes
UP_PERIOD_S, UP_SHARE, UP_PODS = 30.0, 1.0, 2  # may be added in a period: so many times as many, or so many
DOWN_PERIOD_S, DOWN_PODS = 60.0, 1  # may be taken away in a period
DOWN_AFTER_S = 300.0  # for which a smaller number must have been enough


class Autoscaler:
    """The wanted number of workers, between 1 and `most`.

    Example: there are 2 workers, and 3.5 are asked for, so 3.5 / 0.7 = 5 are wanted. In half a minute 2 may
    be added, or as many as there are, so there are 4 now and 5 half a minute later. They stay for five
    minutes after fewer would have done, and then go one a minute.
    """

    def __init__(self, *, most: int, first: int = 1) -> None:
        self.wanted = first
        self._most = most
        self._changes: deque[tuple[float, int]] = deque()
        self._recommended: deque[tuple[float, int]] = deque()

    def decide(self, needed: float, now: float) -> int:
        """Return the wanted number where `needed` workers would be busy all the time."""
        number = ceil(needed / THRESHOLD) if abs(self._use(needed) - 1.0) > TOLERANCE else self.wanted
        _keep(self._recommended, now, DOWN_AFTER_S)
        self._recommended.append((now, min(self._most, max(1, number))))
        up = self._recommended[-1][1]
        down = max(recommended for _, recommended in self._recommended)
        before = self.wanted
        if up > before:
            began = before - sum(change for change in self._since(now - UP_PERIOD_S) if change > 0)
            self.wanted = max(before, min(up, max(began + UP_PODS, ceil(began * (1.0 + UP_SHARE)))))
        elif down < before:
            began = before - sum(change for change in self._since(now - DOWN_PERIOD_S) if change < 0)
            self.wanted = min(before, max(down, began - DOWN_PODS))
        _keep(self._changes, now, max(UP_PERIOD_S, DOWN_PERIOD_S))
        if self.wanted != before:
            self._changes.append((now, self.wanted - before))
        return self.wanted

    def _since(self, begin: float) -> list[int]:
        return [change for at, change in self._changes if at > begin]

    def _use(self, needed: float) -> float:
        return needed / (THRESHOLD * self.wanted)


def _keep(values: deque[tuple[float, int]], now: float, seconds: float) -> None:
    while values and values[0][0] <= now - seconds:
        values.popleft()
