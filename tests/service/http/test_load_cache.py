"""The load cache: jobs that are queued between two reads of the load are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from ditserve.service.fleet import DemandBucket, LoadSnapshot, WorkerState
from ditserve.service.http.load_cache import LoadCache

pytestmark = pytest.mark.anyio
Make = Callable[..., Any]


class Queue:
    """A queue with these workers; `asked` counts the reads of its load."""

    def __init__(self, *workers: WorkerState) -> None:
        self.workers, self.asked = workers, 0

    async def load(self) -> LoadSnapshot:
        self.asked += 1
        return LoadSnapshot(0, 0, 0.0, self.workers, 0.0)


def worker(name: str, backlog: int) -> WorkerState:
    return WorkerState(name, ("fake",), 8, 0.0, 0.001, 0.0, 0, backlog, 0.0, 0.0)


async def test_what_was_queued_counts_as_of_the_idlest_worker_until_the_next_look(
    make_job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.service.http.load_cache.LOAD_FRESH_S", 60.0)
    queue = Queue(worker("busy", 100), worker("idle", 5))
    cache = LoadCache(queue, "fake")  # type: ignore[arg-type]
    await asyncio.gather(*(cache() for _ in range(5)))
    with (
        cache.reserved(make_job(cost_rows=40, floor_rows=10, deadline_at=5.0)),
        cache.reserved(make_job(cost_rows=80, deadline_at=None)),
    ):
        pass
    counted = {worker.worker: worker for worker in (await cache()).workers}
    assert counted["idle"].dues == (
        DemandBucket(-inf, 5, 5),
        DemandBucket(5.0, 40, 10),
        DemandBucket(inf, 80, 80),
    )
    assert (counted["idle"].backlog_rows, counted["busy"]) == (125, queue.workers[0])
    assert queue.asked == 1
    monkeypatch.setattr("ditserve.service.http.load_cache.LOAD_FRESH_S", -1.0)
    assert (await cache()).workers == queue.workers


async def test_of_a_crowd_that_waits_for_one_look_everyone_sees_those_before(make_job: Make) -> None:
    cache = LoadCache(Queue(worker("idle", 5)), "fake")  # type: ignore[arg-type]

    async def come() -> tuple[int, int]:
        (only,) = (await cache()).workers
        with cache.reserved(make_job(cost_rows=40)):
            pass
        return only.backlog_rows, only.running_samples

    assert await asyncio.gather(*(come() for _ in range(3))) == [(5, 0), (45, 1), (85, 2)]


async def test_without_workers_nothing_is_counted(make_job: Make) -> None:
    cache = LoadCache(Queue(), "fake")  # type: ignore[arg-type]
    with cache.reserved(make_job()):
        assert (await cache()).workers == ()


async def test_a_look_meanwhile_does_not_lose_what_is_not_queued_yet(
    make_job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.service.http.load_cache.LOAD_FRESH_S", -1.0)
    cache = LoadCache(Queue(worker("idle", 5)), "fake")  # type: ignore[arg-type]
    with cache.reserved(make_job(cost_rows=40)):
        assert [worker.backlog_rows for worker in (await cache()).workers] == [45]
    assert [worker.backlog_rows for worker in (await cache()).workers] == [5]


async def test_workers_of_another_model_are_not_counted() -> None:
    other = replace(worker("other", 5), models=("other",))
    cache = LoadCache(Queue(worker("own", 5), other), "fake")  # type: ignore[arg-type]
    assert [worker.worker for worker in (await cache()).workers] == ["own"]
