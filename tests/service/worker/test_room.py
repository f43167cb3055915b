"""The room of a worker: a batch and a look-ahead for those who have much, and places for newcomers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.jobs import ANY_FLOW, Claim, Job, Lease
from ditserve.service.planning.ladder import Ladder
from ditserve.service.worker.room import RESERVED_SAMPLES, Room, claim_room, wanted_rows
from ditserve.service.worker.running_job import RunningJob

MakeJob = Callable[..., Job]
MANY = 100


@pytest.fixture(scope="session")
def held(make_job: MakeJob) -> Callable[..., RunningJob]:
    """A job in a worker, of 2 rows a sample."""

    def hold(caller: str, samples: int = 1, *, alone: bool = False, **fields: Any) -> RunningJob:
        job = make_job(caller=caller, seeds=tuple(range(samples)), **fields)
        claim = Claim(job, Lease(job.id, "w1", 1), run_isolated=alone)
        return RunningJob(claim, Ladder(()), claimed_at=0.0, states=[None] * samples)

    return hold


def test_the_room_is_as_in_the_worked_example(held: Callable[..., RunningJob]) -> None:
    jobs = [*(held("many") for _ in range(40)), held("few", 2)]
    room = claim_room(jobs, wanted_rows=80, free_slots=MANY)
    assert room == Room(samples=0, reserved=14, crowded=frozenset({"normal:many"}))


@pytest.mark.parametrize(("ahead_s", "rows"), [(-inf, 24), (0.5, 24), (0.6, 8), (inf, 8)])
def test_only_a_worker_that_is_not_clearly_ahead_claims_more_than_a_batch(ahead_s: float, rows: int) -> None:
    assert wanted_rows(8, lookahead_rows=64, peers=4, ahead_s=ahead_s, balance_s=0.5) == rows


def test_many_workers_each_look_a_batch_ahead_unless_none_is_wanted() -> None:
    wanted = partial(wanted_rows, 16, peers=64, ahead_s=0.0, balance_s=0.5)
    assert (wanted(lookahead_rows=64), wanted(lookahead_rows=0)) == (32, 16)


def test_an_idle_worker_claims_what_it_wants(held: Callable[..., RunningJob]) -> None:
    assert claim_room([], wanted_rows=16, free_slots=MANY) == Room(samples=8, reserved=RESERVED_SAMPLES)
    assert claim_room([], wanted_rows=16, free_slots=3) == Room(samples=3, reserved=3)


def test_another_priority_of_the_same_caller_is_another_flow(held: Callable[..., RunningJob]) -> None:
    room = claim_room([held("a", 8, priority="low")], wanted_rows=16, free_slots=MANY)
    assert room.crowded == {"low:a"}
    assert (room.samples, room.reserved) == (0, RESERVED_SAMPLES)


def test_nothing_joins_a_job_that_runs_alone(held: Callable[..., RunningJob]) -> None:
    assert claim_room([held("a", alone=True)], wanted_rows=80, free_slots=MANY) == Room()


@given(counts=st.lists(st.tuples(st.characters(codec="ascii"), st.integers(1, 9)), max_size=40))
def test_few_samples_of_some_take_no_room_from_those_of_many_until_their_places_are_taken(
    held: Callable[..., RunningJob], counts: Sequence[tuple[str, int]]
) -> None:
    jobs = [held(caller, samples) for caller, samples in counts]
    room = claim_room(jobs, wanted_rows=40, free_slots=10**6)
    crowding = sum(job.missing for job in jobs if job.job.flow in room.crowded)
    few = sum(job.missing for job in jobs) - crowding
    assert room.samples == max(0, 20 - crowding - max(0, few - RESERVED_SAMPLES))
    assert room.reserved == max(0, RESERVED_SAMPLES - few)


def test_a_full_worker_looks_for_jobs_of_flows_that_it_holds_few_of() -> None:
    full, free = Room(samples=0, reserved=14, crowded=frozenset({"a", "b"})), Room(samples=1)
    assert not full.may_take(frozenset())
    assert not full.may_take(frozenset({"a", "b"}))
    assert full.may_take(frozenset({"a", "c"}))
    assert full.may_take(frozenset({"a", ANY_FLOW}))
    assert free.may_take(frozenset())
