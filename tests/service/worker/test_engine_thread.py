"""The engine's thread: its end is noticed; an idle engine that was slow looks whether it is fast again."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest

from ditserve.service.queue.clock import QueueClock
from ditserve.service.worker import engine_thread
from ditserve.service.worker.engine_thread import EngineReport, EngineThread, ProcessorWaits
from tests.service.engine.imitated_device import DeviceBackend
from tests.service.engine.stepping import finished, run

pytestmark = pytest.mark.anyio
Make = Callable[..., Any]
WaitUntil = Callable[..., Awaitable[None]]


async def test_the_end_of_the_thread_is_noticed(make_engine: Make, wait_until: WaitUntil) -> None:
    def deliver(report: EngineReport) -> None:
        raise RuntimeError("nobody foresaw this")

    broken: list[bool] = []
    thread = EngineThread(
        make_engine(),
        deliver=deliver,
        observe=lambda report: None,
        on_broken=lambda: broken.append(True),
        clock=QueueClock(),
        max_rows=8,
    )
    thread.start()
    await wait_until(lambda: broken == [True])
    assert thread.stop(10.0)


async def test_an_idle_engine_that_was_slow_reports_its_pace_again(
    make_engine: Make, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_thread, "MEASURE_EVERY_S", 0.01)
    monkeypatch.setattr(engine_thread, "MEASURE_SHARE", 1e6)
    engine = make_engine()
    engine.warm_up()
    for _ in range(200):
        engine.costs.observe(1, 1.0)
    slow = engine.costs.predict(1)
    assert engine.costs.slowed
    reports: list[EngineReport] = []
    thread = EngineThread(
        engine,
        deliver=reports.append,
        observe=lambda report: None,
        on_broken=lambda: None,
        clock=QueueClock(),
        max_rows=8,
    )
    # Every look stands for a long time, so that the test need not take as long.
    measure = engine.measure_idle
    engine.measure_idle = lambda idle_s: measure(60.0)
    thread.start()
    try:
        await wait_until(lambda: not engine.costs.slowed)
    finally:
        assert thread.stop(10.0)
    assert engine.costs.predict(1) < slow / 10
    step_s = [report.costs.fixed_s + report.costs.per_row_s for report in (reports[0], reports[-1])]
    assert step_s[1] < step_s[0] / 10


@pytest.mark.skipif(
    not Path("/proc/thread-self/schedstat").exists(),
    reason="the kernel counts no waits for a processor: run it on Linux with scheduler statistics",
)
def test_a_thread_for_which_no_processor_is_free_has_waited() -> None:
    cpu = min(os.sched_getaffinity(0))
    burn = f"import os; os.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    waited: list[float] = []

    def work() -> None:
        # Of this thread alone.
        os.sched_setaffinity(0, [cpu])
        waits = ProcessorWaits()
        until = time.monotonic() + 20.0
        while waits() < 0.05 and time.monotonic() < until:
            pass
        waited.append(waits())

    neighbour = Popen([sys.executable, "-c", burn])
    try:
        working = threading.Thread(target=work)
        working.start()
        working.join()
    finally:
        neighbour.kill()
        neighbour.wait()
    assert 0.05 <= waited[0] < 20.0


async def test_a_device_s_last_turn_is_reported_and_the_thread_then_waits(
    make_engine: Callable[..., Any],
    make_request: Callable[..., Any],
    wait_until: Callable[..., Awaitable[None]],
) -> None:
    """Rows on a device are heard of one turn late; nobody else joins who would bring that about."""
    reports: list[EngineReport] = []
    engine = make_engine(DeviceBackend(), clock=time.monotonic)
    engine.warm_up(0.1)
    thread = EngineThread(
        engine,
        deliver=reports.append,
        observe=lambda report: None,
        on_broken=lambda: None,
        clock=QueueClock(),
        max_rows=8,
    )
    thread.start()
    requests = [make_request(f"{k}/0", seed=k) for k in range(3)]
    thread.add([(request, None) for request in requests])

    def done() -> set[str]:
        return {sample.id for report in reports for sample in report.step.finished}

    await wait_until(lambda: done() == {request.id for request in requests})
    await wait_until(lambda: engine.idle)
    assert thread.stop(10.0)
    assert not any(report.crashed for report in reports)
    made = {sample.id: sample.latent for report in reports for sample in report.step.finished}
    expected = finished(run(make_engine(), requests))
    for name, latent in made.items():
        np.testing.assert_array_equal(latent, expected[name].latent)
