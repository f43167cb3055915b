"""Returns: when refused requests come back, so that most are taken when they do.

The refused form a queue outside the service. Each is told to come back when those told before it will have
been served, and newcomers leave them room, as far as callers have been seen to come back at all. Pure: times
are arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from math import ceil

LEAST_S, MOST_S = 1, 120  # of `Retry-After`; clients of OpenAI's libraries wait no longer
LATE_S = 2.0  # after which a request that was told to come back counts as gone
NEAR_S = 1.0  # for which room is kept ahead: `Retry-After` has whole seconds
LEARN = 0.05
KEPT = 10_000  # requests remembered

_ROUNDING_S = 1e-6


@dataclass(slots=True, eq=False)
class _Return:
    """A request that was told to come back at `at`, and will take the whole fleet `service_s` seconds.

    It is `expected` until it came back.
    """

    at: float
    service_s: float
    key: Hashable
    expected: bool = True

    def __lt__(self, other: _Return) -> bool:
        return self.at < other.at


class Returns:
    """The requests that were told to come back to one process.

    Example: the fleet serves 10 requests a second, everybody comes back, and room for one more is free in
    1 s. Of 25 requests refused together the first is told 1 s, the next ten 2 s, the next ten 3 s, and the
    last four 4 s.
    """

    def __init__(self) -> None:
        self.share = 0.0  # of those told to come back who do
        self._coming: list[_Return] = []  # a heap of those for whom no room is kept yet
        self._near: list[_Return] = []  # a heap of the others, until they are too late
        self._by_key: dict[Hashable, list[_Return]] = {}
        self._near_s = 0.0  # seconds of those who are near and expected
        self._served_at = 0.0  # when all told so far would have been served

    def came_back(self, key: Hashable, now: float) -> bool:
        """Return whether the request `key` was told to come back by now. It is then forgotten."""
        self._move_on(now)
        due = min(self._by_key.get(key, ()), default=None)
        if due is None or due.at > now:
            return False
        self._remove(due)
        self.share += LEARN * (1.0 - self.share)
        return True

    def reserved_s(self, now: float) -> float:
        """Return the fleet's seconds that newcomers leave to those who are due to come back."""
        self._move_on(now)
        return self._near_s * self.share

    def tell(self, key: Hashable, now: float, *, free_s: float, service_s: float) -> int:
        """Return the whole seconds after which a refused request should come back.

        Args:
            free_s: seconds until there is room for it, were it alone.
            service_s: seconds that it will take the whole fleet.
        """
        start = max(self._served_at, now + LEAST_S)
        told_s = max(LEAST_S, ceil(max(free_s, start - now) - _ROUNDING_S))
        if told_s > MOST_S:
            return MOST_S
        self._served_at = start + self.share * service_s
        if len(self._coming) + len(self._near) < KEPT:
            told = _Return(now + told_s, service_s, key)
            heapq.heappush(self._coming, told)
            self._by_key.setdefault(key, []).append(told)
        return told_s

    def _move_on(self, now: float) -> None:
        """Keep room for those who are near by now, and forget those who are too late."""
        while self._coming and self._coming[0].at <= now + NEAR_S:
            told = heapq.heappop(self._coming)
            heapq.heappush(self._near, told)
            self._near_s += told.service_s
        while self._near and self._near[0].at + LATE_S < now:
            told = heapq.heappop(self._near)
            if told.expected:
                self._remove(told)
                self.share -= LEARN * self.share
        if not self._near:
            # What adding and subtracting rounds off is not kept.
            self._near_s = 0.0

    def _remove(self, told: _Return) -> None:
        """Expect a near request no more."""
        told.expected = False
        self._near_s = max(0.0, self._near_s - told.service_s)
        others = self._by_key[told.key]
        others.remove(told)
        if not others:
            del self._by_key[told.key]
