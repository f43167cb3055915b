"""Demand by deadline: the worked example, and workers that report none."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ditserve.service.fleet import DemandBucket, WorkerState
from ditserve.service.planning.demand import StepBucket, demand_buckets, demand_of
from tests.service.planning.machine import quick


def test_buckets_are_as_in_the_worked_example() -> None:
    buckets = list(demand_buckets(10.0, 50, 0.0, 0.1))
    assert [round(50 * bucket.share) for bucket in buckets] == [21, 23, 6]
    assert [bucket.at for bucket in buckets] == pytest.approx([8.0, 5.7, 5.1])


def test_without_a_deadline_all_steps_are_due_at_no_time() -> None:
    assert list(demand_buckets(inf, 50, 0.0, 0.1)) == [StepBucket(inf, inf, 1.0)]


@quick
@given(st.floats(-10.0, 1e4), st.integers(1, 200), st.floats(1e-3, 10.0))
@example(2.0, 3, 1.890625)
@example(12.0, 6, 0.8)  # rounding leaves a step a hair inside its interval
def test_shares_are_of_all_steps_and_nearer_buckets_come_later(
    deadline: float, steps: int, pass_s: float
) -> None:
    buckets = list(demand_buckets(deadline, steps, 0.0, pass_s))
    assert sum(bucket.share for bucket in buckets) == pytest.approx(1.0)
    intervals = [bucket.interval for bucket in buckets]
    assert intervals == sorted(set(intervals), reverse=True)


def test_a_worker_that_reports_no_demand_has_its_backlog_due_first() -> None:
    worker = WorkerState("w", ("m",), 8, 0.9, 0.1, 0.0, 3, 70, 0.0, 0.0)
    assert demand_of(worker) == (DemandBucket(-inf, 70, 70),)
