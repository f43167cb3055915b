"""The wire: what goes in comes out, and what is not ours is refused."""

from collections.abc import Callable
from dataclasses import asdict

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.fleet import WorkerState
from ditserve.service.jobs import AdapterUse, ConditionTerm, Image, Job, JobResult
from ditserve.service.rung import Rung
from ditserve.service.wire import WireError, pack, unpack

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
terms = st.builds(
    ConditionTerm,
    labels=st.lists(st.none() | st.integers(0, 10_000), max_size=3).map(tuple),
    weight=finite,
)
rungs = st.builds(
    Rung, steps=st.integers(1, 1000), guidance_interval=st.tuples(finite, finite), quality=finite
)
jobs = st.builds(
    Job,
    condition=st.lists(terms, max_size=3).map(tuple),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4).map(tuple),
    guidance_interval=st.tuples(finite, finite),
    guidance_scale=finite,
    steps=st.integers(1, 1000),
    previews=st.integers(0, 1000),
    created_at=finite,
    deadline_at=st.none() | finite,
    min_steps=st.integers(1, 1000),
    cost_rows=st.integers(0, 2**40),
    requested=st.none() | rungs,
    admitted=st.none() | rungs,
)
results = st.builds(
    JobResult,
    images=st.lists(st.builds(Image, seed=st.integers(0, 2**63 - 1)), min_size=1, max_size=3).map(tuple),
    steps_requested=st.integers(1, 1000),
    steps_used=st.integers(1, 1000),
    timings_ms=st.dictionaries(st.text(), finite, max_size=4),
    attempt=st.integers(1, 9),
)
states = st.builds(
    WorkerState,
    models=st.lists(st.text(), max_size=2).map(tuple),
    max_rows=st.integers(1, 64),
    step_fixed_s=finite,
    step_per_row_s=finite,
    decode_s=finite,
    running_samples=st.integers(0, 64),
    backlog_rows=st.integers(0, 2**40),
    last_step_age_s=finite,
    updated_at=finite,
)


@given(jobs)
def test_job_survives_the_wire(job: Job) -> None:
    assert Job.from_bytes(job.to_bytes()) == job


@given(results)
def test_result_survives_the_wire(result: JobResult) -> None:
    assert JobResult.from_bytes(result.to_bytes()) == result


@given(states)
def test_worker_state_survives_the_wire(state: WorkerState) -> None:
    assert WorkerState.from_bytes(state.to_bytes()) == state


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_unknown_versions_are_refused(version: object, make_job: Callable[..., Job]) -> None:
    data = msgpack.packb({**asdict(make_job()), "v": version})
    with pytest.raises(WireError, match="schema version"):
        Job.from_bytes(data)


def test_unknown_fields_are_ignored_and_missing_ones_refused(make_job: Callable[..., Job]) -> None:
    job = make_job(requested=Rung("ddim-20", "ddim", 20, "leading", (0.0, 1.0), 0.0))
    fields = unpack(job.to_bytes())
    later = {**fields, "surprise": 1, "requested": {**fields["requested"], "surprise": b"\xff"}}
    assert Job.from_bytes(pack(later)) == job
    del fields["seeds"]
    with pytest.raises(WireError, match="not a job"):
        Job.from_bytes(pack(fields))


@given(st.binary(max_size=64))
def test_no_bytes_do_worse_than_a_wire_error(data: bytes) -> None:
    for kind in (Job, JobResult, WorkerState):
        with pytest.raises(WireError):
            kind.from_bytes(data)


def test_a_job_with_adapters_stays_on_the_backbone_that_they_change(make_job: Callable[..., Job]) -> None:
    assert not make_job().consent.own_backbone
    assert make_job(adapters=(AdapterUse("noir", 1.0, "11"),)).consent.own_backbone
