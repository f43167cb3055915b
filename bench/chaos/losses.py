"""Faults of what Redis holds: records and indexes that go, evictions, messages of other releases."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from ditserve.bench.chaos.faults import Faults
from ditserve.bench.load.cluster import TestCluster
from ditserve.service.queue.keys import Keys
from ditserve.service.wire import NEWEST, WireError, pack, unpack

KEYS = Keys("dit")
EVICTING_S = 3.0
LATER_S = 1.0  # for which a message is of a later version
# Fields of a later release, of a kind that this one has no reader for.
LATER = {"surprise": {"of": ["a later release", b"\xff"]}, "retry_after_s": "soon", "errors": "all of them"}


@asynccontextmanager
async def _redis(cluster: TestCluster) -> AsyncIterator[Redis]:
    async with Redis.from_url(cluster.redis_url) as client:
        yield client


async def _some(client: Redis, rng: random.Random, pattern: str) -> list[str]:
    """Return one of the keys that begin so, none if there is none."""
    found = [key.decode() async for key in client.scan_iter(match=KEYS.prefix + pattern, count=1000)]
    return [rng.choice(sorted(found))] if found else []


async def _delete_record(cluster: TestCluster, rng: random.Random) -> None:
    """Delete the record of a job, the events or the result, or a field of it."""
    async with _redis(cluster) as client:
        for key in await _some(client, rng, rng.choice(("job:*", "job:*", "events:*", "result:*"))):
            if key.startswith(KEYS.job("")) and rng.random() < 0.3:
                await client.hdel(key, rng.choice(("wire", "state", "flow", "rows", "owner", "attempt")))
            else:
                await client.delete(key)


async def _delete_index(cluster: TestCluster, rng: random.Random) -> None:
    """Delete an index, or an entry of one."""
    async with _redis(cluster) as client:
        index = rng.choice(KEYS.permanent)
        entries: Any = await client.zrange(index, 0, -1) if await client.type(index) == b"zset" else []
        if entries and rng.random() < 0.5:
            await client.zrem(index, rng.choice(entries))
        else:
            await client.delete(index)


async def _delete_leases_of_the_dead(cluster: TestCluster, rng: random.Random) -> None:
    """Delete all leases, and kill a worker at once: nobody renews its own."""
    async with _redis(cluster) as client:
        cluster.signal(rng.choice(cluster.workers), signal.SIGKILL)
        await client.delete(KEYS.leases)


async def _evict(cluster: TestCluster, rng: random.Random) -> None:
    """Let Redis evict whatever it likes for some seconds."""
    async with _redis(cluster) as client:
        memory: Any = await client.info("memory")
        await client.config_set("maxmemory-policy", "allkeys-random")
        await client.config_set("maxmemory", int(memory["used_memory"] * (0.9 + 0.1 * rng.random())))
        await asyncio.sleep(EVICTING_S)
        await client.config_set("maxmemory", 0)
        await client.config_set("maxmemory-policy", "noeviction")


async def _add_fields(cluster: TestCluster, rng: random.Random) -> None:
    """Add fields to a job, its error, a result and a report, as a later release would."""
    async with _redis(cluster) as client:
        for key in await _some(client, rng, "job:*"):
            for name in ("wire", "error"):
                await _rewrite_field(client, key, name, NEWEST)
        for key in await _some(client, rng, "result:*"):
            result: Any = await client.get(key)
            await client.set(key, _later(result, NEWEST), keepttl=True, xx=True)
        reports: Any = await client.hkeys(KEYS.reports)
        for worker in reports:
            await _rewrite_field(client, KEYS.reports, worker, NEWEST)


async def _raise_version(cluster: TestCluster, rng: random.Random) -> None:
    """Let a job, a result and the reports be of a later version for a while."""
    async with _redis(cluster) as client:
        jobs, results = await _some(client, rng, "job:*"), await _some(client, rng, "result:*")
        reports: Any = await client.hkeys(KEYS.reports)
        before: list[tuple[str, Any]] = [(key, await client.hget(key, "wire")) for key in jobs]
        stored: list[tuple[str, Any]] = [(key, await client.get(key)) for key in results]
        for key in jobs:
            await _rewrite_field(client, key, "wire", NEWEST + 1)
        for key, data in stored:
            await client.set(key, _later(data, NEWEST + 1), keepttl=True, xx=True)
        for worker in reports:
            await _rewrite_field(client, KEYS.reports, worker, NEWEST + 1)
        await asyncio.sleep(LATER_S)
        for key, data in before:
            if await client.hexists(key, "wire"):
                await client.hset(key, "wire", data)
        for key, data in stored:
            await client.set(key, data, keepttl=True, xx=True)


async def _rewrite_field(client: Redis, key: str, name: str | bytes, version: int) -> None:
    data: Any = await client.hget(key, name)
    if data is not None and await client.hexists(key, name):
        await client.hset(key, name, _later(data, version))


def _later(data: bytes | None, version: int) -> bytes:
    """Return a message with more fields, in another version; one that cannot be read stays as it is."""
    try:
        fields = unpack(data or b"") | LATER
    except WireError:
        return data or b""
    if "extra" in fields:
        fields["extra"] = {**fields["extra"], **LATER}
    return pack(fields, version)


LOST_RECORDS: Faults = {
    "record deleted": (_delete_record, 4),
    "index deleted": (_delete_index, 4),
    "leases deleted, worker killed": (_delete_leases_of_the_dead, 1),
}
EVICTION: Faults = {"eviction": (_evict, 1)}
OTHER_RELEASES: Faults = {"fields added": (_add_fields, 2), "version raised": (_raise_version, 1)}
