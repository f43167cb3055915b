"""Returns: when refused requests come back, so that most are taken when they do.

The refused form a queue outside the service. Each is told to come back when those told before it will have
been served, and newcomers leave them room, as far as callers have been seen to come back at all. Pure: times
are arguments.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from dataclasses import dataclass
from math import ceil

LEAST_S, MOST_S = 1, 120  # of `Retry-After`; clients of OpenAI's libraries wait no longer
LATE_S = 2.0  # after which a request that was told to come back counts as gone
NEAR_S = 1.0  # for which room is kept ahead: `Retry-After` has whole seconds
LEARN = 0.05
KEPT = 10_000  # requests remembered

_ROUNDING_S = 1e-6


@dataclass(frozen=True, slots=True)
class _Return:
    """A request that was told to come back at `at`, and will take the whole fleet `service_s` seconds."""

    at: float
    service_s: float
    key: Hashable


class Returns:
    """The requests that were told to come back to one process.

    Example: the fleet serves 10 requests a second, everybody comes back, and room for one more is free in
    1 s. Of 25 requests refused together the first is told 1 s, the next ten 2 s, the next ten 3 s, and the
    last four 4 s.
    """

    def __init__(self) -> None:
        self.share = 0.0  # of those told to come back who do
        self._due: list[_Return] = []  # the soonest first
        self._served_at = 0.0  # when all told so far would have been served

    def came_back(self, key: Hashable, now: float) -> bool:
        """Return whether the request `key` was told to come back by now. It is then forgotten."""
        self._forget(now)
        for index, told in enumerate(self._due):
            if told.at > now:
                break
            if told.key == key:
                del self._due[index]
                self.share += LEARN * (1.0 - self.share)
                return True
        return False

    def reserved_s(self, now: float) -> float:
        """Return the fleet's seconds that newcomers leave to those who are due to come back."""
        self._forget(now)
        seconds = 0.0
        for told in self._due:
            if told.at > now + NEAR_S:
                break
            seconds += told.service_s
        return seconds * self.share

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
        if len(self._due) < KEPT:
            insort(self._due, _Return(now + told_s, service_s, key), key=lambda told: told.at)
        return told_s

    def _forget(self, now: float) -> None:
        """Drop those who are too late."""
        late = 0
        while late < len(self._due) and self._due[late].at + LATE_S < now:
            self.share -= LEARN * self.share
            late += 1
        del self._due[:late]
