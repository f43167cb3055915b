"""Capacity: the worked examples."""

from __future__ import annotations

from math import inf

import pytest

from ditserve.service.jobs import DemandBucket, LoadSnapshot, WorkerState
from ditserve.service.planning.capacity import Capacity


def worker(name: str, rows_per_s: float, *demand: DemandBucket) -> WorkerState:
    return WorkerState(name, ("m",), 1, 0.0, 1 / rows_per_s, 0.0, 0, 0, 0.0, 0.0, dues=demand)


def load(*workers: WorkerState, queued_rows: int = 0) -> LoadSnapshot:
    return LoadSnapshot(0, queued_rows, 0.0, workers, 0.0)


def test_the_queue_drains_as_in_the_worked_example() -> None:
    a, b = worker("A", 5.0, DemandBucket(inf, 50, 50)), worker("B", 5.0, DemandBucket(inf, 100, 100))
    capacity = Capacity(load(a, b, queued_rows=150))
    assert capacity.queue_drain_time() == pytest.approx(30.0)
    assert capacity.queue_drain_time(50) == pytest.approx(35.0)
    assert capacity.queue_drain_time(due=0.0) == pytest.approx(15.0)  # before both backlogs
    assert capacity.drain_time() == pytest.approx(30.0)
    assert Capacity(load(queued_rows=1)).drain_time() == inf


@pytest.mark.parametrize(("claimed", "broken"), [(60, False), (80, True), (120, False)])
def test_a_later_deadline_breaks_as_in_the_worked_example(claimed: int, broken: bool) -> None:
    capacity = Capacity(load(worker("A", 10.0, DemandBucket(10.0, claimed, claimed))))
    assert capacity.breaks_later_deadline(30, 5.0, now=0.0, margin=1.0) is broken
    assert not capacity.breaks_later_deadline(30, 10.0, now=0.0, margin=1.0)  # it is not later


def test_a_tight_deadline_counts_on_small_batches_as_in_the_worked_example() -> None:
    busy = WorkerState("w", ("m",), 64, 0.02, 0.005, 0.0, 0, 150, 0.0, 0.0)
    assert Capacity(load(busy)).drain_time() == pytest.approx(150 / (64 / 0.34), rel=0.06)
    assert Capacity(load(busy), pass_s=4.0 / 50).drain_time() == pytest.approx(1.0)
    assert Capacity(load(busy), pass_s=0.001).drain_time() == pytest.approx(150 * 0.025)
