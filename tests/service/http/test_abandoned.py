"""Jobs that nobody waits for: they are cancelled in order, through outages, and not too many are kept."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ditserve.service.errors import QueueUnavailable
from ditserve.service.http import abandoned
from ditserve.service.http.abandoned import Abandoned
from ditserve.service.queue.queue_client import Queue
from tests.conftest import wait_until

pytestmark = pytest.mark.anyio


class FakeQueue:
    """A queue that may be away; `late` jobs come to it only after they were first asked for."""

    def __init__(self, *late: str) -> None:
        self.away = False
        self.late = set(late)
        self.cancelled: list[str] = []

    async def cancel(self, job_id: str, *, holder: str = "") -> bool:
        if self.away:
            raise QueueUnavailable()
        if job_id in self.late:
            self.late.remove(job_id)
            return False
        self.cancelled.append(job_id)
        return True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PATIENCE_S": 0.05, "PAUSE_S": 0.05, "KEPT": 3}.items():
        monkeypatch.setattr(abandoned, name, value)


def cancelling(queue: FakeQueue) -> Abandoned:
    return Abandoned(cast(Queue, cast(Any, queue)))


async def test_a_job_is_cancelled_at_once_or_after_the_outage() -> None:
    queue = FakeQueue()
    jobs = cancelling(queue)
    await jobs.cancel("a")
    assert queue.cancelled == ["a"]
    queue.away = True
    for job_id in "bcdef":
        await jobs.cancel(job_id)
    assert queue.cancelled == ["a"]
    queue.away = False
    await wait_until(lambda: queue.cancelled == ["a", "d", "e", "f"])


async def test_a_job_that_may_still_come_is_asked_for_twice() -> None:
    queue = FakeQueue("once", "twice")
    jobs = cancelling(queue)
    jobs.add("once")
    jobs.add("twice", denials=2)
    await wait_until(lambda: queue.cancelled == ["twice"])
    assert not queue.late


async def test_closing_leaves_the_rest() -> None:
    queue = FakeQueue()
    queue.away = True
    jobs = cancelling(queue)
    jobs.add("a")
    await jobs.aclose()
    queue.away = False
    await cancelling(queue).cancel("b")
    assert queue.cancelled == ["b"]
