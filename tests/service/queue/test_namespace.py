"""A namespace is of one model: whoever comes with another waits a little, and is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from ditserve.service.fleet import Starting
from ditserve.service.queue import namespace
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio


async def test_another_model_is_refused_unless_its_workers_leave(
    connect: Callable[..., Awaitable[Broker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespace, "EVERY_S", 0.05)
    broker = await connect(report_ttl_s=60)
    await broker.report(Starting("w1", "other", "warming up"))

    async def check(model: str, patience_s: float) -> None:
        await namespace.refuse_other_models(broker.load, namespace="dit", model=model, patience_s=patience_s)

    await check("other", 0)
    with pytest.raises(ValueError, match="dit is in use by workers of other; give fake another"):
        await check("fake", 0.1)
    # The workers of the model that was served before may still be leaving.
    waiting = asyncio.create_task(check("fake", 60))
    await asyncio.sleep(0)
    await broker.retire("w1")
    await asyncio.wait_for(waiting, 5)
