"""Capacity: the worked examples."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from ditserve.service.fleet import DemandBucket, LoadSnapshot, SlowSpell, WorkerState
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


def test_a_worker_counts_for_the_batches_that_it_runs() -> None:
    """A pass of 64 rows would be better by its costs alone, which would promise twice as much as it does."""
    a = WorkerState("A", ("m",), 64, 1.0, 0.1, 0.0, 0, 0, 0.0, 0.0, dues=(DemandBucket(inf, 100, 100),))
    assert Capacity(load(a)).drain_time() < 13.0
    assert Capacity(load(replace(a, batch_rows=10))).drain_time() == pytest.approx(
        100 / 10 * (1.0 + 10 * 0.1)
    )
    assert Capacity(load(replace(a, batch_rows=10))).in_passes_of(1.5).drain_time() == pytest.approx(
        100 / 5 * 1.5
    )


def test_a_worker_is_as_slow_as_it_may_be_over_the_time_that_counts() -> None:
    spells = (SlowSpell(1.0, 4.0), SlowSpell(8.0, 2.0))
    a = replace(worker("A", 10.0, DemandBucket(inf, 100, 100)), slow=spells)
    assert Capacity(load(a)).drain_time() == pytest.approx(10.0)
    for within_s, expected_s in ((0.1, 40.0), (1.0, 40.0), (7.0, 40.0), (8.0, 20.0), (inf, 20.0)):
        assert Capacity(load(a), within_s=within_s).drain_time() == pytest.approx(expected_s)


def test_a_stall_lasts_as_long_again_as_in_the_worked_example() -> None:
    step_s = 0.2
    stalling = WorkerState("w", ("m",), 1, 0.0, step_s, 0.0, 1, 10, last_step_age_s=0.9, updated_at=100.0)
    late = LoadSnapshot(0, 0, 0.0, (stalling,), taken_at=100.6)
    assert Capacity(late).drain_time() == pytest.approx(10 * step_s + 0.8)
    alone_s = Capacity(late).time_in_every_batch(rows=1, steps=1, samples=1)
    assert alone_s == pytest.approx(step_s + 0.8)
    soon = replace(late, workers=(replace(stalling, last_step_age_s=0.05),))
    assert Capacity(soon).drain_time() == pytest.approx(10 * step_s)


def test_the_queue_flows_past_a_worker_that_stalls() -> None:
    stalling = replace(worker("A", 10.0), last_step_age_s=100.0)
    assert Capacity(load(stalling, worker("B", 10.0), queued_rows=100)).queue_drain_time() == pytest.approx(
        10.0
    )


def test_a_tight_deadline_counts_on_small_batches_as_in_the_worked_example() -> None:
    busy = WorkerState("w", ("m",), 64, 0.02, 0.005, 0.0, 0, 150, 0.0, 0.0)
    assert Capacity(load(busy)).drain_time() == pytest.approx(150 / (64 / 0.34), rel=0.06)
    assert Capacity(load(busy)).in_passes_of(4.0 / 50).drain_time() == pytest.approx(1.0)
    assert Capacity(load(busy)).in_passes_of(0.001).drain_time() == pytest.approx(150 * 0.025)
