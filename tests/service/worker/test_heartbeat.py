"""Reports during an outage of the queue."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from ditserve.service.errors import QueueUnavailable
from ditserve.service.worker.heartbeat import Reporting

pytestmark = pytest.mark.anyio


class Unreachable:
    async def report(self, state: Any) -> None:
        raise QueueUnavailable("no route")


async def test_an_outage_is_logged_once_per_report_however_much_changes() -> None:
    reporting = Reporting(Unreachable(), every_s=60.0, busy_s=0.001)  # type: ignore[arg-type]
    with capture_logs() as logs:
        running = asyncio.create_task(reporting.run(object, None))  # type: ignore[arg-type]
        for _ in range(20):
            reporting.changed()
            await asyncio.sleep(0.005)
        running.cancel()
        await asyncio.wait([running])
    assert [entry["event"] for entry in logs] == ["report failed"]
