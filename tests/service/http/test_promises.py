"""Promises: broken ones make admission careful, and the refused are told different times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from ditserve.service.errors import Cancelled, DeadlineExceeded, Overloaded
from ditserve.service.http.promises import Promises
from ditserve.service.jobs import DemandBucket, LoadSnapshot, WorkerState
from ditserve.service.planning.admission import Admission, AdmissionRequest
from ditserve.service.telemetry import metrics
from tests.service.planning.machine import BY_STEPS, LADDER

Make = Callable[..., Any]


def load(rows: int = 0) -> LoadSnapshot:
    dues = (DemandBucket(time.time() + 0.5, rows, rows),) if rows else ()
    worker = WorkerState("w", ("m",), 8, 0.0, 0.01, 0.0, 0, rows, 0.0, 0.0, dues=dues)
    return LoadSnapshot(0, 0, 0.0, (worker,), 0.0)


def ask(promises: Promises, rows: int = 0, *, within_s: float = 1.0, sender: str = "a") -> Admission:
    now = time.time()
    request = AdmissionRequest(BY_STEPS[50], 1.0, 1, now + within_s, allow_degraded=False, min_steps=50)
    return promises.admit(request, load(rows), sender=sender, now=now)


def counted(outcome: str) -> float:
    value: float = metrics.PROMISES.labels(outcome)._value.get()
    return value


def test_a_broken_promise_makes_the_next_admission_more_careful(make_job: Make) -> None:
    promises = Promises("m", LADDER, clock=time.time)
    assert ask(promises, within_s=0.8).accepted  # 50 rows take 0.5 s
    before = counted("broken"), counted("kept")
    job = make_job(deadline_at=time.time() + 60.0)
    for _ in range(20):
        with pytest.raises(DeadlineExceeded), promises.observed(job):
            raise DeadlineExceeded()
    with promises.observed(job):
        pass
    with pytest.raises(Cancelled), promises.observed(job):
        raise Cancelled()
    with promises.observed(make_job(deadline_at=None)):
        pass
    assert (counted("broken"), counted("kept")) == (before[0] + 20, before[1] + 1)
    with pytest.raises(Overloaded) as refused:
        ask(promises, within_s=0.8)
    # An idle machine could do it, so it is worth coming back.
    assert refused.value.retry_after is not None
    assert metrics.ADMISSION_MARGIN.labels("m")._value.get() > 2.0


def test_an_answer_after_the_deadline_is_a_broken_promise(make_job: Make) -> None:
    before = counted("broken")
    with Promises("m", LADDER, clock=time.time).observed(make_job(deadline_at=time.time() - 1.0)):
        pass
    assert counted("broken") == before + 1


def test_the_refused_are_told_when_there_is_room_and_not_all_the_same() -> None:
    promises = Promises("m", LADDER, clock=time.time)
    told: list[float] = []
    for k in range(30):
        with pytest.raises(Overloaded) as refused:
            ask(promises, 600, sender=str(k))  # 6 s of work are before it
        told.append(refused.value.retry_after or 0.0)
    assert min(told) >= 5
    promises.gate.returns.share = 1.0
    for k in range(30, 90):
        with pytest.raises(Overloaded) as refused:
            ask(promises, 600, sender=str(k))
        told.append(refused.value.retry_after or 0.0)
    assert len(set(told)) > 10
    assert max(told) > 25
