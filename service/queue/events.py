"""A job's event stream, followed to its end. Blocking reads, each follower on a connection of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

from redis.asyncio import Redis

from ditserve.service.errors import JobNotFound
from ditserve.service.jobs import TERMINAL_STATES, EventKind, JobEvent
from ditserve.service.queue.connection import reaching
from ditserve.service.queue.keys import Keys
from ditserve.service.wire import unpack

BLOCK_MS = 5000
GRACE_S = 5.0
PAGE = 64


async def follow(client: Redis, keys: Keys, job_id: str, after: str) -> AsyncIterator[JobEvent]:
    """Events after the given id; ends after a terminal event, or when the job has ended and nothing is left
    to read.

    Raises `JobNotFound` if the job is unknown or its record has expired, `QueueUnavailable` if Redis goes
    away.
    """
    block, ended = None, False
    while True:
        entries = await _read(client, keys.events(job_id), after, block)
        for event in entries:
            after = event.id
            yield event
            if event.terminal:
                return
        if not entries:
            if ended:
                return
            ended = await _has_ended(client, keys.job(job_id), job_id)
        block = None if entries or ended else BLOCK_MS


async def _read(client: Redis, stream: str, after: str, block: int | None) -> list[JobEvent]:
    async with reaching(GRACE_S + BLOCK_MS / 1000):
        reply: Any = await client.xread({stream: after}, count=PAGE, block=block)
    entries = (
        next(iter(reply.values()))[0] if isinstance(reply, dict) and reply else (reply[0][1] if reply else [])
    )
    return [_event(entry_id, fields) for entry_id, fields in entries]


def _event(entry_id: bytes, fields: Mapping[bytes, bytes]) -> JobEvent:
    return JobEvent(entry_id.decode(), cast(EventKind, fields[b"kind"].decode()), unpack(fields[b"data"]))


async def _has_ended(client: Redis, key: str, job_id: str) -> bool:
    async with reaching(GRACE_S):
        state: Any = await client.hget(key, "state")
    if state is None:
        raise JobNotFound(f"There is no job {job_id}.")
    return state.decode() in TERMINAL_STATES
