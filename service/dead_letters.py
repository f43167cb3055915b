"""`python -m service dead list` and `dead requeue ID`: jobs dead-lettered after too many attempts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from ditserve.commands import command_line
from ditserve.service.errors import ServiceError
from ditserve.service.exit_statuses import FAILED, MISCONFIGURED
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings

USAGE = f"usage: {command_line('service dead')} list | {command_line('service dead')} requeue ID"


def run(words: Sequence[str], settings: Settings) -> int:
    """Run the command; return the exit status.

    It is 0, 1 when there is nothing to requeue or Redis cannot be used, 2 after a mistake.
    """
    try:
        if settings.redis_url is None:
            raise ValueError("REDIS_URL is not set: name the Redis whose dead jobs are meant")
        url = settings.redis_url.get_secret_value()
        match words:
            case ["list"]:
                return asyncio.run(_list(url, settings.namespace))
            case ["requeue", job_id]:
                return asyncio.run(_requeue(url, settings.namespace, job_id))
            case _:
                raise ValueError(USAGE)
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISCONFIGURED


async def _list(url: str, namespace: str) -> int:
    broker = await Broker.connect(url, namespace=namespace)
    try:
        for status in await broker.dead():
            error = status.error or {}
            created = datetime.fromtimestamp(status.created_at, UTC).isoformat(timespec="seconds")
            worker = error.get("extra", {}).get("worker", "-")
            attempts, detail = status.attempt, error.get("detail", "")
            print(f"{status.id}  {created}  attempts={attempts}  worker={worker}  {detail}")
    finally:
        await broker.aclose()
    return 0


async def _requeue(url: str, namespace: str, job_id: str) -> int:
    broker = await Broker.connect(url, namespace=namespace)
    try:
        if await broker.requeue(job_id):
            print(f"{job_id} is queued again")
            return 0
        print(f"error: {job_id} is not a dead job", file=sys.stderr)
        return 1
    finally:
        await broker.aclose()
