"""Waiting for Redis without a limit, by a process that cannot begin without it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from ditserve.service.errors import QueueUnavailable

RETRY_S = 0.5

T = TypeVar("T")

log = structlog.get_logger()


async def until_answered(call: Callable[[], Awaitable[T]]) -> T:
    """Return what `call` returns, which is called again until Redis can be used, however long that takes.

    The log says what is waited for, once for every reason.
    """
    reason = ""
    while True:
        try:
            answer = await call()
        except QueueUnavailable as error:
            if error.detail != reason:
                reason = error.detail
                log.warning("waiting for Redis", reason=reason)
            await asyncio.sleep(RETRY_S)
        else:
            if reason:
                log.info("Redis answers")
            return answer
