"""The lag of the event loop: a process that was held up knows about how long."""

from __future__ import annotations

import asyncio
import time

import pytest

from ditserve.service.http import loop_lag
from ditserve.service.http.loop_lag import LoopLag
from tests.conftest import wait_until

pytestmark = pytest.mark.anyio


async def test_a_loop_that_is_held_up_is_late_and_recovers() -> None:
    lag = LoopLag()
    assert lag.waited_s() == 0.0
    time.sleep(0.5)  # noqa: ASYNC251
    assert lag.waited_s() > 0.8
    await asyncio.sleep(0)
    await wait_until(lambda: lag.waited_s() < 0.2)


async def test_the_timer_ends_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "UNUSED_S", 0.0)
    lag = LoopLag()
    lag.waited_s()
    await wait_until(lambda: lag._timer is None)
