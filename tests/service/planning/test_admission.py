"""Admission: what is taken can be met, what is refused could not, and the answer says when to come back."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.fleet import DemandBucket, LoadSnapshot, WorkerState
from ditserve.service.planning import admission
from ditserve.service.planning.admission import NO_WORKER, Admission, AdmissionRequest
from ditserve.service.planning.capacity import Capacity, drain_time
from ditserve.service.planning.planner import DEADLINE, LOAD, Policy
from ditserve.service.rung import Consent
from tests.service.planning.machine import BY_STEPS, LADDER, MAX_ROWS, line, quick


def worker(
    name: str = "w",
    *,
    running: int = 0,
    backlog: int = 0,
    decode: float = 0.0,
    dues: tuple[DemandBucket, ...] = (),
) -> WorkerState:
    return WorkerState(name, ("m",), MAX_ROWS, 0.9, 0.1, decode, running, backlog, 0.0, 0.0, dues=dues)


def load(*workers: WorkerState, queued_rows: int = 0) -> LoadSnapshot:
    return LoadSnapshot(queued_rows // 50, queued_rows, 0.0, workers, 0.0)


def admit(
    snapshot: LoadSnapshot,
    deadline: float | None,
    *,
    steps: int = 50,
    samples: int = 1,
    allow: bool = True,
    floor: int = 1,
    row_cost: float = 1.0,
    policy: Policy | None = None,
) -> Admission:
    admission_request = AdmissionRequest(
        rung=BY_STEPS[steps],
        guidance_scale=1.0,
        samples=samples,
        deadline_at=deadline,
        allow_degraded=allow,
        consent=Consent(floor),
        row_cost=row_cost,
    )
    return admission.admit(admission_request, snapshot, ladder=LADDER, now=0.0, policy=policy)


loads = st.builds(
    lambda workers, queued: load(*workers, queued_rows=queued),
    st.lists(
        st.builds(worker, running=st.integers(0, 20), backlog=st.integers(0, 2000)), min_size=1, max_size=8
    ),
    st.integers(0, 5000),
)


class TestAdmission:
    def test_an_idle_fleet_takes_it_as_asked(self) -> None:
        answer = admit(load(worker()), 60.0)
        assert (answer.accepted, answer.rung.steps, answer.degraded, answer.reason) == (True, 50, False, None)
        assert answer.predicted_s == pytest.approx(50.0)

    def test_a_tight_deadline_gets_the_best_rung_that_keeps_it(self) -> None:
        answer = admit(load(worker()), 40.0)
        assert (answer.accepted, answer.rung.steps, answer.degraded, answer.reason) == (True, 30, True, LOAD)

    def test_consent_is_kept(self) -> None:
        assert not admit(load(worker()), 40.0, allow=False).accepted
        assert not admit(load(worker()), 30.0, floor=30).accepted

    def test_an_impossible_deadline_is_refused_without_a_time_to_come_back(self) -> None:
        answer = admit(load(worker()), 5.0)
        assert (answer.accepted, answer.reason, answer.retry_after_s) == (False, DEADLINE, None)

    def test_a_full_house_says_when_to_come_back(self) -> None:
        busy = load(worker(running=8, backlog=400), queued_rows=4000)
        answer = admit(busy, 60.0)
        assert (answer.accepted, answer.reason) == (False, LOAD)
        rate = MAX_ROWS / line().predict(MAX_ROWS)
        assert answer.retry_after_s == pytest.approx((4400 + 10) / rate - 60.0 / 1.1, rel=0.05)

    def test_without_deadline_everything_is_taken_as_asked(self) -> None:
        answer = admit(load(worker(running=8, backlog=400), queued_rows=100_000), None)
        assert (answer.accepted, answer.rung.steps, answer.degraded) == (True, 50, False)

    def test_without_workers_only_work_without_deadline_is_taken(self) -> None:
        assert admit(load(), None).accepted
        refused = admit(load(), 60.0)
        assert (refused.accepted, refused.reason) == (False, NO_WORKER)
        assert refused.retry_after_s is not None

    def test_all_images_of_a_request_count(self) -> None:
        assert admit(load(worker()), 60.0).rung.steps == 50
        assert admit(load(worker()), 60.0, samples=8).rung.steps < 50

    def test_decoding_counts(self) -> None:
        assert admit(load(worker(decode=20.0)), 60.0).rung.steps < 50

    def test_a_second_worker_helps(self) -> None:
        one = admit(load(worker(running=8, backlog=800)), 60.0)
        two = admit(load(worker(running=8, backlog=800), worker("idle")), 60.0)
        assert not one.accepted
        assert (two.accepted, two.rung.steps) == (True, 50)

    def test_it_counts_on_cuts_of_accepted_work_as_far_as_that_consents(self) -> None:
        willing = worker(running=20, backlog=800, dues=(DemandBucket(150.0, 800, 200),))
        unwilling = worker(running=20, backlog=800, dues=(DemandBucket(150.0, 800, 800),))
        assert admit(load(willing), 155.0, allow=False).accepted
        assert not admit(load(unwilling), 155.0, allow=False).accepted
        assert not admit(load(willing), 155.0, allow=False, policy=Policy(recut=False)).accepted

    def test_what_is_due_later_does_not_stand_in_the_way(self) -> None:
        later = worker(running=20, backlog=800, dues=(DemandBucket(1000.0, 800, 800),))
        sooner = worker(running=20, backlog=800, dues=(DemandBucket(50.0, 800, 800),))
        never = worker(running=20, backlog=800, dues=(DemandBucket(inf, 800, 800),))
        assert admit(load(later), 110.0, allow=False).accepted
        assert admit(load(never), 110.0, allow=False).accepted
        assert not admit(load(sooner), 110.0, allow=False).accepted

    def test_no_request_is_taken_at_the_cost_of_a_later_deadline(self) -> None:
        rate = MAX_ROWS / line().predict(MAX_ROWS)
        just_holds = worker(running=20, backlog=800, dues=(DemandBucket(1.1 * 801 / rate, 800, 800),))
        assert not admit(load(just_holds), 110.0, allow=False).accepted
        assert admit(load(just_holds), None).accepted
        hopeless = worker(running=20, backlog=800, dues=(DemandBucket(120.0, 8000, 8000),))
        assert admit(load(hopeless), 110.0, allow=False).accepted

    def test_rows_of_a_larger_size_count_for_more(self) -> None:
        idle = load(worker())
        assert admit(idle, 60.0, allow=False).accepted
        assert not admit(idle, 60.0, allow=False, row_cost=4.0).accepted


class TestAdmissionAlways:
    @quick
    @given(loads, st.floats(0.1, 500.0), st.booleans(), st.integers(1, 50), st.integers(1, 4))
    def test_what_is_accepted_is_predicted_to_be_met(
        self, snapshot: LoadSnapshot, deadline: float, allow: bool, floor: int, samples: int
    ) -> None:
        answer = admit(snapshot, deadline, allow=allow, floor=floor, samples=samples)
        if answer.accepted:
            assert answer.predicted_s * Policy().admission_margin <= deadline * (1 + 1e-9)
            assert answer.predicted_s >= Capacity(snapshot).queue_drain_time(samples * answer.rung.steps) * (
                1 - 1e-9
            )
            assert answer.rung.steps >= min(floor, 50)
            assert answer.degraded == (answer.rung.steps < 50)
            assert allow or not answer.degraded
        else:
            assert answer.reason in (LOAD, DEADLINE)
            assert (answer.retry_after_s or 1.0) >= 1.0

    @quick
    @given(loads, st.floats(0.1, 500.0), st.floats(0.0, 100.0))
    def test_more_time_never_turns_an_acceptance_into_a_refusal(
        self, snapshot: LoadSnapshot, deadline: float, more: float
    ) -> None:
        first, second = admit(snapshot, deadline), admit(snapshot, deadline + more)
        assert second.accepted or not first.accepted
        if first.accepted:
            assert second.rung.steps >= first.rung.steps

    @quick
    @given(loads, st.floats(0.1, 500.0), st.integers(1, 1000))
    def test_more_load_never_turns_a_refusal_into_an_acceptance(
        self, snapshot: LoadSnapshot, deadline: float, more: int
    ) -> None:
        busier = replace(snapshot, queued_rows=snapshot.queued_rows + more)
        assert admit(snapshot, deadline).accepted or not admit(busier, deadline).accepted

    @quick
    @given(loads, st.integers(0, 1000))
    def test_draining_is_bounded_by_one_worker_doing_all_and_by_perfect_sharing(
        self, snapshot: LoadSnapshot, extra: int
    ) -> None:
        rate = MAX_ROWS / line().predict(MAX_ROWS)
        rows = extra + snapshot.queued_rows + sum(worker.backlog_rows for worker in snapshot.workers)
        seconds = drain_time(snapshot, extra)
        assert rows / rate / len(snapshot.workers) <= seconds * (1 + 1e-9)
        assert seconds <= rows / rate + 1e-9
