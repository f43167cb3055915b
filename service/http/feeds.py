"""Event feeds: the events of a job are read and encoded once in a process, however many clients follow it.

Each client keeps its own place in the feed, and nothing is queued for it. The fastest client sets the pace.
A client that falls so far behind that the feed no longer has its next event reads on from Redis by itself, at
its own pace. One that does not read at all is cut off by `protocol`, and resumes with `Last-Event-ID`.

Events that come within `PACE_S` of others go out together: waking a hundred clients takes some milliseconds.

With a window of 1 MiB and previews of 50 kB, a client may be about 20 previews behind the fastest one.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

WINDOW_BYTES = 2**20
AHEAD_BYTES = 2**16  # that a feed may be ahead of its fastest client
PACE_S = 0.05

# The place of an event in its job's stream: the two numbers of its id in Redis.
Position = tuple[int, int]
# Past every event: for the one that tells how a job ended whose stream has expired.
END: Position = (2**63, 0)


@dataclass(frozen=True, slots=True)
class EncodedEvent:
    """One event as the clients get it."""

    position: Position
    data: bytes


# Reads the events of a job after a position, until it has ended.
Source = Callable[[Position], AsyncGenerator[EncodedEvent]]


@dataclass(slots=True)
class _Feed:
    """The latest events of one job, all those after `start`; and how the reading of them ended."""

    start: Position
    events: list[EncodedEvent] = field(default_factory=list)
    size: int = 0
    clients: int = 0
    ended: bool = False
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    # Bytes since a client had read everything, and the event that one has.
    ahead: int = 0
    awaited: asyncio.Event = field(default_factory=asyncio.Event)
    # Runs until the clients may be woken again; and whether something came meanwhile.
    pause: asyncio.TimerHandle | None = None
    late: bool = False

    async def read(self, source: Source) -> None:
        """Read the job's events from `start` on until it has ended, or until an error."""
        try:
            async with aclosing(source(self.start)) as events:
                async for event in events:
                    self._keep(event)
                    self._announce_soon()
                    if self.ahead > AHEAD_BYTES:
                        self._announce()
                        self.awaited.clear()
                        await self.awaited.wait()
        except Exception as error:
            # The clients raise it.
            self.error = error
        self.ended = True
        self._announce()

    def after(self, position: Position) -> bytes:
        """Return the events after `position` as one piece."""
        first = bisect_right(self.events, position, key=lambda event: event.position)
        return b"".join(event.data for event in self.events[first:])

    def await_more(self) -> None:
        """Tell the feed that a client has read everything."""
        self.ahead = 0
        self.awaited.set()

    def _keep(self, event: EncodedEvent) -> None:
        self.events.append(event)
        self.size += len(event.data)
        self.ahead += len(event.data)
        while self.size > WINDOW_BYTES and len(self.events) > 1:
            oldest = self.events.pop(0)
            self.size -= len(oldest.data)
            self.start = oldest.position

    def _announce_soon(self) -> None:
        if self.pause is not None:
            self.late = True
            return
        self._announce()
        self.pause = asyncio.get_running_loop().call_later(PACE_S, self._end_pause)

    def _end_pause(self) -> None:
        self.pause = None
        if self.late:
            self.late = False
            self._announce_soon()

    def _announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Feeds:
    """The feeds of all jobs that clients of this process follow."""

    def __init__(self) -> None:
        self._feeds: dict[str, tuple[_Feed, asyncio.Task[None]]] = {}

    async def follow(self, job_id: str, position: Position, source: Source) -> AsyncGenerator[bytes]:
        """Yield the job's events after `position`, several in one piece, until it has ended.

        A feed begins with the first client of a job and ends with the last. Raises what `source` raises.
        """
        entry = self._open(job_id, position, source)
        feed, reading = entry
        feed.clients += 1
        try:
            while True:
                changed = feed.changed
                if position < feed.start:
                    async with aclosing(source(position)) as events:
                        async for event in events:
                            position = event.position
                            yield event.data
                            if position >= feed.start:
                                break
                        else:
                            return
                elif data := feed.after(position):
                    position = feed.events[-1].position
                    yield data
                elif feed.error is not None:
                    raise feed.error
                elif feed.ended:
                    return
                else:
                    feed.await_more()
                    await changed.wait()
        finally:
            feed.clients -= 1
            if not feed.clients:
                if self._feeds.get(job_id) is entry:
                    del self._feeds[job_id]
                reading.cancel()
                await asyncio.wait([reading])

    def _open(self, job_id: str, position: Position, source: Source) -> tuple[_Feed, asyncio.Task[None]]:
        known = self._feeds.get(job_id)
        if known is None or known[0].error is not None:
            feed = _Feed(position)
            known = self._feeds[job_id] = (feed, asyncio.create_task(feed.read(source)))
        return known
