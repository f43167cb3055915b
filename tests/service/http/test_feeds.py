"""Event feeds: one reading of a job for all who follow it, whatever their pace and place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from ditserve.service.errors import QueueUnavailable
from ditserve.service.http import feeds
from ditserve.service.http.feeds import EncodedEvent, Feeds, Position
from tests.conftest import wait_until

pytestmark = pytest.mark.anyio


class Log:
    """The events of a job as a source reads them, and how many were read."""

    def __init__(self) -> None:
        self.events: list[EncodedEvent] = []
        self.read = self.sources = 0
        self.error: Exception | None = None
        self.ended = False
        self._grown = asyncio.Event()

    def add(self, data: bytes) -> None:
        self.events.append(EncodedEvent((len(self.events) + 1, 0), data))
        self.wake()

    def wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    def end(self, error: Exception | None = None) -> None:
        self.ended, self.error = True, error
        self.wake()

    async def source(self, after: Position) -> AsyncGenerator[EncodedEvent]:
        self.sources += 1
        number = after[0]
        while True:
            grown = self._grown
            if number < len(self.events):
                self.read += 1
                yield self.events[number]
                number += 1
            elif self.error is not None:
                raise self.error
            elif self.ended:
                return
            else:
                await grown.wait()


async def collected(all_feeds: Feeds, log: Log, after: int = 0) -> bytes:
    return b"".join([piece async for piece in all_feeds.follow("job", (after, 0), log.source)])


async def test_a_hundred_clients_read_each_event_once() -> None:
    all_feeds, log = Feeds(), Log()
    clients = [asyncio.create_task(collected(all_feeds, log)) for _ in range(100)]
    for number in range(50):
        log.add(b"%d " % number)
        await asyncio.sleep(0)
    log.end()
    whole = b"".join(event.data for event in log.events)
    assert await asyncio.gather(*clients) == [whole] * 100
    assert (log.sources, log.read) == (1, 50)


async def test_a_client_that_comes_later_gets_what_it_lacks() -> None:
    all_feeds, log = Feeds(), Log()
    for number in range(5):
        log.add(b"%d" % number)
    resumed = asyncio.create_task(collected(all_feeds, log, after=3))
    await wait_until(lambda: log.read == 2)
    fresh = asyncio.create_task(collected(all_feeds, log))
    log.add(b"5")
    log.end()
    assert (await resumed, await fresh) == (b"345", b"012345")


async def test_a_slow_client_holds_up_nobody_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "WINDOW_BYTES", 100)
    all_feeds, log = Feeds(), Log()
    slow = all_feeds.follow("job", (0, 0), log.source)
    log.add(b"%010d" % 0)
    pieces = [await anext(slow)]
    fast = asyncio.create_task(collected(all_feeds, log))
    for number in range(1, 200):
        log.add(b"%010d" % number)
    log.end()
    whole = b"".join(event.data for event in log.events)
    assert await asyncio.wait_for(fast, 5) == whole
    pieces += [piece async for piece in slow]
    assert b"".join(pieces) == whole


async def test_the_only_client_sets_the_pace() -> None:
    all_feeds, log = Feeds(), Log()
    for _ in range(1000):
        log.add(bytes(10_000))
    slow = all_feeds.follow("job", (0, 0), log.source)
    await anext(slow)
    for _ in range(100):
        await asyncio.sleep(0)
    assert log.read < 20
    await slow.aclose()


async def test_an_error_reaches_all_and_the_next_client_begins_anew() -> None:
    all_feeds, log = Feeds(), Log()
    log.add(b"0")
    clients = [asyncio.create_task(collected(all_feeds, log)) for _ in range(3)]
    await wait_until(lambda: log.read == 1)
    log.end(QueueUnavailable())
    for client in clients:
        with pytest.raises(QueueUnavailable):
            await client
    log.error = None
    assert await collected(all_feeds, log) == b"0"


async def test_nothing_is_read_once_all_have_gone() -> None:
    all_feeds, log = Feeds(), Log()
    log.add(b"0")
    clients = [all_feeds.follow("job", (0, 0), log.source) for _ in range(2)]
    assert [await anext(client) for client in clients] == [b"0", b"0"]
    for client in clients:
        await client.aclose()
    log.add(b"1")
    await asyncio.sleep(0)
    assert log.read == 1
    assert await asyncio.wait_for(anext(all_feeds.follow("job", (1, 0), log.source)), 5) == b"1"
