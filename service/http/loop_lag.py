"""The lag of the event loop: how long a request waited before this process looked at it.

On a host without processor time to spare, requests wait in the sockets of the process, some for seconds, and
no line of its code sees them. A timer that comes late tells.
"""

import asyncio
from typing import Final

TICK_S: Final = 0.05
UNUSED_S: Final = 5.0  # after which the timer stops until somebody asks again
DECAY: Final = 0.8
ROUNDS: Final = 2  # of the loop, in which a connection is accepted and its request is read


class LoopLag:
    """The lag of the event loop in which it is used."""

    def __init__(self) -> None:
        self._late_s = 0.0
        self._due_at = self._asked_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def waited_s(self) -> float:
        """Return about how many seconds a request that is looked at now has waited."""
        loop = asyncio.get_running_loop()
        self._asked_at = loop.time()
        if self._timer is None:
            self._schedule(loop)
        return ROUNDS * max(self._late_s, self._asked_at - self._due_at, 0.0)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_at = loop.time() + TICK_S
        self._timer = loop.call_at(self._due_at, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._late_s = max(loop.time() - self._due_at, DECAY * self._late_s)
        if loop.time() - self._asked_at < UNUSED_S:
            self._schedule(loop)
