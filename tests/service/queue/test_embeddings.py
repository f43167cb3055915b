"""Text encodings in Redis: workers share them, they are bounded, and an outage costs only a short wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ditserve.service.queue.connection import open_client
from ditserve.service.queue.embeddings import Embeddings

pytestmark = pytest.mark.anyio
Open = Callable[..., Embeddings]


@pytest.fixture
async def shelf(redis_url: str, namespace: str) -> AsyncIterator[Open]:
    """Give a function that opens caches; afterwards check that all their keys have a TTL, and remove them."""
    caches: list[Embeddings] = []

    def open_cache(url: str = redis_url, max_bytes: int = 1 << 20) -> Embeddings:
        caches.append(Embeddings(url, namespace=namespace, max_bytes=max_bytes, clock=time.time))
        return caches[-1]

    yield open_cache
    client = open_client(redis_url, connections=1)
    async for key in client.scan_iter(f"{{{namespace}}}:*"):
        assert await client.pttl(key) > 0
        await client.delete(key)
    await client.aclose()
    for cache in caches:
        await cache.aclose()


async def from_a_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments)


async def test_what_one_puts_another_gets(shelf: Open) -> None:
    one, other = shelf(), shelf()
    assert await from_a_thread(one.get_many, ["a", "b"]) == [None, None]
    await from_a_thread(one.put_many, {"a": b"1234", "b": b"5678"})
    assert await from_a_thread(other.get_many, ["b", "c", "a"]) == [b"5678", None, b"1234"]
    assert (one.misses, other.hits, other.misses, one.bypasses) == (2, 2, 1, 0)


async def test_the_oldest_leave_when_there_are_too_many_bytes(shelf: Open) -> None:
    cache = shelf(max_bytes=3 * 4)
    for k in range(5):
        await from_a_thread(cache.put_many, {f"k{k}": b"abcd"})
    values = await from_a_thread(cache.get_many, [f"k{k}" for k in range(5)])
    assert [value is not None for value in values] == [False, False, True, True, True]
    assert cache.evictions == 2


async def test_without_redis_nothing_is_known_and_nothing_is_asked_for_a_while(shelf: Open) -> None:
    cache = shelf("redis://127.0.0.1:1/0")
    assert await from_a_thread(cache.get_many, ["a", "b"]) == [None, None]
    await from_a_thread(cache.put_many, {"a": b"1"})
    assert await from_a_thread(cache.get_many, ["a"]) == [None]
    assert cache.bypasses == 3


async def test_a_malformed_url_is_refused(shelf: Open) -> None:
    with pytest.raises(ValueError, match="must"):
        shelf("http://nowhere")
