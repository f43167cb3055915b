"""The clock of the queue: one for all hosts, sure within a round trip, and followed when it is set."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from ditserve.service.errors import QueueUnavailable
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.clock import READINGS, QueueClock
from tests.conftest import ManualClock

pytestmark = pytest.mark.anyio
Connect = Callable[..., Awaitable[Broker]]


class ServerClock:
    """The clock of a Redis, `ahead_s` of the local one."""

    def __init__(self, local: ManualClock, ahead_s: float) -> None:
        self.local, self.ahead_s = local, ahead_s

    @property
    def now(self) -> float:
        return self.local() + self.ahead_s

    async def read(self, clock: QueueClock, there_s: float, back_s: float) -> None:
        async def tell() -> tuple[int, int]:
            self.local.advance(there_s)
            told = self.now
            self.local.advance(back_s)
            return int(told), int(told % 1 * 1e6)

        await clock.read(tell)


@pytest.fixture
def redis(clock: ManualClock) -> ServerClock:
    return ServerClock(clock, ahead_s=489.8)


@pytest.fixture
def queue_clock(clock: ManualClock) -> QueueClock:
    return QueueClock(local=clock, wall=lambda: clock() + 7.0)


async def test_the_reading_with_the_shortest_round_trip_counts(
    queue_clock: QueueClock, redis: ServerClock
) -> None:
    assert queue_clock() == redis.local() + 7.0, "the host's own, before the first reading"
    await redis.read(queue_clock, 0.3, 0.1)
    assert queue_clock() == pytest.approx(redis.now + 0.1, abs=1e-5), "off by half the difference of the ways"
    await redis.read(queue_clock, 0.01, 0.01)
    await redis.read(queue_clock, 0.9, 0.0)
    assert queue_clock() == pytest.approx(redis.now, abs=1e-5)
    redis.local.advance(1000.0)
    assert queue_clock() == pytest.approx(redis.now, abs=1e-5)
    assert queue_clock.shared(queue_clock.local(5.0)) == 5.0


@pytest.mark.parametrize("jump_s", [90.0, -90.0, 0.1])
async def test_a_clock_that_is_set_is_followed_by_the_next_reading(
    queue_clock: QueueClock, redis: ServerClock, jump_s: float
) -> None:
    for _ in range(READINGS):
        await redis.read(queue_clock, 0.001, 0.001)
    redis.ahead_s += jump_s
    await redis.read(queue_clock, 0.02, 0.02)
    assert queue_clock() == pytest.approx(redis.now, abs=0.001)
    set_far = abs(jump_s) > 1.0
    assert (queue_clock.moved_at == redis.local()) == set_far


async def test_skew_is_a_metric_and_one_warning_until_it_changes(clock: ManualClock) -> None:
    skew_s = [90.0]
    redis = ServerClock(clock, 500.0)
    queue_clock = QueueClock(local=clock, wall=lambda: redis.now + skew_s[0])
    with capture_logs() as logs:
        for skew_s[0] in (90.0, 90.2, 0.0, 0.0, -3.0):
            await redis.read(queue_clock, 0.001, 0.001)
            shown = REGISTRY.get_sample_value("dit_clock_offset_seconds")
            assert shown == pytest.approx(skew_s[0], abs=0.01)
    assert [entry["ahead_s"] for entry in logs] == pytest.approx([90.0, 0.0, -3.0], abs=0.01)


async def test_a_broker_follows_its_server_whatever_the_clock_of_the_host(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.service.queue.reads.QueueClock", lambda: QueueClock(wall=lambda: 1.0))
    broker = await connect()
    assert broker.clock() == pytest.approx((await broker.load()).taken_at, abs=0.5)
    assert abs(broker.clock() - time.time()) < 0.5


async def test_no_lease_is_swept_by_a_clock_that_was_set(
    connect: Connect, make_job: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    broker = await connect(clock=clock, lease_s=15)
    await broker.submit(make_job())  # type: ignore[arg-type]
    await broker.claim("other", models=["emoji"], max_samples=1)
    # The worker has not read the clock since.
    known = clock.now
    monkeypatch.setattr(broker, "clock", lambda: known)
    clock.advance(90.0)
    with pytest.raises(QueueUnavailable, match="clock"):
        await broker.sweep()
    monkeypatch.setattr(broker, "clock", clock)
    assert await broker.sweep() == 1
