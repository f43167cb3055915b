"""Promises: broken ones make admission careful, and the refused are told different times."""

from __future__ import annotations

import time

import pytest

from ditserve.service.errors import Overloaded
from ditserve.service.fleet import DemandBucket, LoadSnapshot, WorkerState
from ditserve.service.http.promises import Promises
from ditserve.service.planning.admission import Admission, AdmissionRequest
from ditserve.service.rung import Consent
from ditserve.service.telemetry import metrics
from tests.service.planning.machine import BY_STEPS, LADDER


def load(rows: int = 0, *, kept: int = 0, broken: int = 0) -> LoadSnapshot:
    dues = (DemandBucket(time.time() + 0.5, rows, rows),) if rows else ()
    worker = WorkerState("w", ("m",), 8, 0.0, 0.01, 0.0, 0, rows, 0.0, 0.0, dues=dues)
    return LoadSnapshot(0, 0, 0.0, (worker,), 0.0, kept=kept, broken=broken)


def ask(promises: Promises, snapshot: LoadSnapshot, *, within_s: float = 1.0, sender: str = "a") -> Admission:
    now = time.time()
    request = AdmissionRequest(
        BY_STEPS[50], 1.0, 1, now + within_s, allow_degraded=False, consent=Consent(50)
    )
    return promises.admit(request, snapshot, sender=sender, now=now)


def test_broken_promises_of_the_fleet_make_the_next_admission_more_careful() -> None:
    """Whatever had become of promises before this process began teaches it nothing."""
    promises = Promises("m", LADDER)
    assert ask(promises, load(kept=1000, broken=500), within_s=0.8).accepted  # 50 rows take 0.5 s
    assert ask(promises, load(kept=1100, broken=500), within_s=0.8).accepted
    with pytest.raises(Overloaded) as refused:
        ask(promises, load(kept=1100, broken=520), within_s=0.8)
    # An idle machine could do it, so it is worth coming back.
    assert refused.value.retry_after is not None
    assert metrics.ADMISSION_MARGIN.labels("m")._value.get() > 2.0


def test_a_queue_that_lost_its_data_begins_to_count_anew() -> None:
    promises = Promises("m", LADDER)
    ask(promises, load(kept=1000, broken=500))
    ask(promises, load(kept=3, broken=0))
    assert ask(promises, load(kept=5, broken=0), within_s=0.8).accepted


def test_the_refused_are_told_when_there_is_room_and_not_all_the_same() -> None:
    promises = Promises("m", LADDER)
    told: list[float] = []
    for k in range(30):
        with pytest.raises(Overloaded) as refused:
            ask(promises, load(600), sender=str(k))  # 6 s of work are before it
        told.append(refused.value.retry_after or 0.0)
    assert min(told) >= 5
    promises.gate.returns.share = 1.0
    for k in range(30, 90):
        with pytest.raises(Overloaded) as refused:
            ask(promises, load(600), sender=str(k))
        told.append(refused.value.retry_after or 0.0)
    assert len(set(told)) > 10
    assert max(told) > 25
