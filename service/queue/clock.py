"""The one clock of a queue: that of its Redis, whatever the clocks of the hosts say.

Whatever hosts compare (when a job came and is due, when a lease ends, how old a report is) is in seconds of
Redis' `TIME`: scripts read it, and every process follows it here. Durations within a process are of its
monotonic clock. A host's own clock serves people alone, in logs and in the age of an API key.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf
from typing import Final

import structlog

from ditserve.service.telemetry import metrics

READ_EVERY_S: Final = 2.0
FIRST_READINGS: Final = 3  # when a process connects
READINGS: Final = 8  # kept, of which the surest counts
SKEW_S: Final = 1.0  # of a host's clock, that is worth a warning

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reading:
    """Redis' clock beside the monotonic one: `offset_s` ahead of it, give or take `error_s`."""

    offset_s: float
    error_s: float


class QueueClock:
    """Redis' clock in seconds since the epoch, as this process knows it between two readings.

    It goes on by the process' monotonic clock, so that a step of the host's own clock changes nothing. Of the
    last readings the one with the shortest round trip counts. One that contradicts it shows that the clock of
    Redis was moved, or is another server's: then it alone counts.

    Example: a reading leaves at 10.0 s of the monotonic clock, says 500.0 s, and is back at 10.4 s: Redis is
    489.8 s ahead, give or take 0.2 s. The next has a round trip of 0.02 s and says 489.9 s ahead, give or
    take 0.01 s. They agree, and the second counts. A third says 579.9 s, as surely: Redis' clock was set
    90 s forward.

    Args:
        local: the monotonic clock, in seconds.
        wall: the clock of this host, in seconds since the epoch. It stands for Redis' until the first
            reading.
    """

    def __init__(
        self, *, local: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._local, self._wall = local, wall
        self._offset_s = wall() - local()
        self._readings: deque[Reading] = deque(maxlen=READINGS)
        self._told_s = 0.0  # the skew that was warned of last
        # By the monotonic clock, when Redis' clock was last found set by more than `SKEW_S`.
        self.moved_at = -inf

    def __call__(self) -> float:
        return self.shared(self._local())

    def shared(self, local: float) -> float:
        """Return the time by Redis' clock at a time of the monotonic clock."""
        return local + self._offset_s

    def local(self, shared: float) -> float:
        """Return the time by the monotonic clock at a time of Redis' clock."""
        return shared - self._offset_s

    async def read(self, tell: Callable[[], Awaitable[tuple[int, int]]]) -> None:
        """Take a reading. `tell` asks Redis for its `TIME`: seconds and microseconds."""
        sent = self._local()
        seconds, microseconds = await tell()
        self._observe(sent, seconds + microseconds / 1e6, self._local())

    def _observe(self, sent: float, told: float, received: float) -> None:
        reading = Reading(told - (sent + received) / 2, (received - sent) / 2)
        moves = [
            abs(reading.offset_s - kept.offset_s) - reading.error_s - kept.error_s for kept in self._readings
        ]
        if max(moves, default=0.0) > 0:
            self._readings.clear()
        if max(moves, default=0.0) > SKEW_S:
            self.moved_at = received
        self._readings.append(reading)
        self._offset_s = min(self._readings, key=lambda kept: kept.error_s).offset_s
        self._tell_skew(self._wall() - self())

    def _tell_skew(self, skew_s: float) -> None:
        metrics.CLOCK_OFFSET_SECONDS.set(skew_s)
        if abs(skew_s - self._told_s) > SKEW_S:
            self._told_s = skew_s
            log.warning(
                "the clocks of this host and of Redis differ; that of Redis counts: synchronise them (NTP)",
                ahead_s=round(skew_s, 3),
            )
