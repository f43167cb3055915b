"""The fixture of the queue's tests: a client that sees what lies in Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    """A client of the queue's Redis, for what the queue itself would not do."""
    client = Redis.from_url(redis_url)
    yield client
    await client.aclose()
