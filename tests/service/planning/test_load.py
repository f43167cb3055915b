"""The figures for autoscalers: workers that are wanted, by what is asked for and by what was accepted."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from ditserve.service.fleet import DemandBucket, LoadSnapshot, WorkerState
from ditserve.service.planning.admission import AdmissionRequest
from ditserve.service.planning.gate import Gate
from ditserve.service.planning.load import HORIZON_S, UNKNOWN_S, backlog_workers, worker_seconds
from ditserve.service.rung import Consent
from tests.service.planning.machine import BY_STEPS, LADDER

NOW = 1000.0


def worker(*dues: DemandBucket, per_row_s: float = 0.1, fixed_s: float = 0.0) -> WorkerState:
    rows = sum(bucket.rows for bucket in dues)
    return WorkerState("w", ("m",), 64, fixed_s, per_row_s, 0.0, 0, rows, 0.0, NOW, dues=dues)


def load(*workers: WorkerState, jobs: int = 0, rows: int = 0) -> LoadSnapshot:
    return LoadSnapshot(jobs, rows, 0.0, workers, NOW)


def due(in_s: float, rows: int) -> DemandBucket:
    return DemandBucket(NOW + in_s, rows, rows)


def ask(gate: Gate, snapshot: LoadSnapshot, steps: int, within_s: float | None, **more: object) -> float:
    fields = {"allow_degraded": True, "consent": Consent(), **more}
    at = None if within_s is None else NOW + within_s
    request = AdmissionRequest(BY_STEPS[steps], 1.0, 1, at, **fields)  # type: ignore[arg-type]
    return gate.admit(request, snapshot, sender=object(), now=NOW).offered_s


def test_work_is_counted_in_seconds_of_one_worker_however_many_there_are() -> None:
    assert worker_seconds(load(worker()), 100) == pytest.approx(10.0)
    assert worker_seconds(load(worker(), worker()), 100) == pytest.approx(10.0)
    # Two of different speed: 10 and 5 rows a second.
    assert worker_seconds(load(worker(), worker(per_row_s=0.2)), 75) == pytest.approx(10.0)


def test_a_pass_that_must_be_short_makes_work_larger() -> None:
    """The worked example: 12 rows fit into passes of 80 ms, 150 rows a second."""
    fleet = load(worker(fixed_s=0.02, per_row_s=0.005))
    assert worker_seconds(fleet, 100, 0.08) == pytest.approx(100 / 150)
    assert worker_seconds(fleet, 100) < 100 / 150


def test_the_backlog_is_held_against_its_deadlines() -> None:
    """The worked example, and the queue beside it."""
    assert backlog_workers(load(worker(due(inf, 600)))) == pytest.approx(1.0)
    assert backlog_workers(load(worker(due(inf, 600), due(100, 600)))) == pytest.approx(1.2)
    # What is due at once is due in a minute: no worker comes sooner.
    assert backlog_workers(load(worker(due(1, 600)))) == pytest.approx(1.0)
    # As much waits as is claimed, as patiently.
    assert backlog_workers(load(worker(due(120, 1200)), jobs=9, rows=1200)) == pytest.approx(2.0)
    assert backlog_workers(load(worker(), jobs=1, rows=600)) == pytest.approx(600 * 0.1 / HORIZON_S)
    assert backlog_workers(load(worker())) == 0.0


def test_a_fleet_of_none_is_woken() -> None:
    assert backlog_workers(load(jobs=1, rows=10)) == 1.0
    assert backlog_workers(load()) == 0.0
    assert ask(Gate(LADDER), load(), 10, within_s=1.0) == UNKNOWN_S


def test_refused_and_degraded_requests_count_as_asked_for() -> None:
    """A worker does 10 rows a second, and everything before the newcomer fills its deadline."""
    idle, full = load(worker()), load(worker(due(6.0, 60)))
    gate = Gate(LADDER)
    assert ask(gate, idle, 50, within_s=20.0) == pytest.approx(5.0)
    assert ask(gate, load(worker(due(6.0, 30))), 50, within_s=8.0) == pytest.approx(5.0)  # degraded
    assert ask(gate, full, 50, within_s=6.0, allow_degraded=False, consent=Consent(50)) == pytest.approx(5.0)
    assert ask(gate, full, 50, within_s=None) == pytest.approx(5.0)


def test_what_no_worker_could_do_in_time_is_not_asked_of_more() -> None:
    """50 steps take an idle worker 5 s. In 2.5 s it does 20, and nobody does 50 in 1 s without fewer."""
    gate, idle = Gate(LADDER), load(worker())
    assert ask(gate, idle, 50, within_s=2.5) == pytest.approx(2.0)
    assert ask(gate, idle, 50, within_s=1.0, allow_degraded=False, consent=Consent(50)) == 0.0


def test_who_comes_back_as_told_was_counted_before() -> None:
    gate, full = Gate(LADDER), load(worker(due(6.0, 60)))
    request = AdmissionRequest(BY_STEPS[50], 1.0, 1, NOW + 6.0, allow_degraded=False, consent=Consent(50))
    refused = gate.admit(request, full, sender="a", now=NOW)
    assert not refused.accepted
    assert refused.offered_s == pytest.approx(5.0)
    again = NOW + (refused.retry_after_s or 0.0) + 0.1
    returning = replace(request, deadline_at=again + 6.0)
    assert gate.admit(returning, full, sender="a", now=again).offered_s == 0.0
    assert gate.admit(returning, full, sender="b", now=again).offered_s == pytest.approx(5.0)
