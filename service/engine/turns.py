"""Whose turn it is among groups whose rows cannot share a forward pass: deficit round robin (Shreedhar & Varghese 1995).

A group's share of the machine is in proportion to what it has waiting, so that samples advance equally fast in large and
small groups. Every visit adds to what a group is owed, and it runs once that pays for its batch; a visit adds no less than
a `PATIENCE`th of a batch, so that waiting makes up for size and nobody starves. Pure: no clock, no samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

PATIENCE: Final = 16  # visits after which the smallest group runs

G = TypeVar("G", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a group would run now and what it has waiting in all, in tokens or any one unit; both positive."""

    batch: float
    waiting: float


class Turns(Generic[G]):
    """Remembers what each group is owed for as long as it has something waiting."""

    def __init__(self) -> None:
        self._owed: dict[G, float] = {}  # in the order of visits; the first is being visited

    def next(self, demands: Mapping[G, Demand]) -> G:
        """The group to run now, which pays for its batch; `demands` are all that have something waiting, at least one."""
        self._owed = {group: owed for group, owed in self._owed.items() if group in demands}
        for group in demands:
            self._owed.setdefault(group, 0.0)
        if len(demands) == 1:
            self._owed = dict.fromkeys(demands, 0.0)
            return next(iter(demands))
        largest = max(demands.values(), key=lambda demand: demand.waiting)
        rate = largest.batch / largest.waiting  # what the largest group is owed per visit pays for its batch
        while True:
            group, owed = next(iter(self._owed.items()))
            demand = demands[group]
            if owed >= demand.batch:
                self._owed[group] = owed - demand.batch
                return group
            del self._owed[group]
            self._owed[group] = owed
            visited = next(iter(self._owed))
            self._owed[visited] += max(rate * demands[visited].waiting, demands[visited].batch / PATIENCE)
