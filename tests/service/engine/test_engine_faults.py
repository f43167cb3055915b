"""Faults and cancels of one sample: they harm no other and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ditserve.service.engine.samples import StepReport
from ditserve.service.errors import DeadlineExceeded, NumericalError
from tests.service.engine.stepping import failed, finished, run

Make = Callable[..., Any]


def test_a_cancelled_sample_takes_no_further_step(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend()
    engine = make_engine(backend)
    engine.add(make_request("stays/0"))
    engine.add(make_request("goes/0"))
    engine.step()
    engine.cancel("goes/0")
    engine.cancel("never-was/0")
    assert engine.step().rows == 2
    assert engine.free_samples == 15
    assert set(finished(run(engine))) == {"stays/0"}


def test_a_sample_past_its_deadline_fails_before_the_next_step(make_engine: Make, make_request: Make) -> None:
    now = [1000.0]
    engine = make_engine(clock=lambda: now[0])
    engine.add(make_request("late/0", deadline_at=1001.0))
    engine.add(make_request("free/0"))
    assert engine.step().failed == ()
    now[0] = 1001.0
    report = engine.step()
    assert isinstance(report.failed[0].error, DeadlineExceeded)
    assert report.failed[0].error.detail == "the deadline passed after 1 of 8 steps"
    assert report.rows == 0
    assert engine.step().rows == 2
    assert set(finished(run(engine))) == {"free/0"}


def test_what_is_not_finite_fails_alone(make_engine: Make, make_request: Make) -> None:
    alone = finished(run(make_engine(), [make_request("sound/0")]))["sound/0"]
    engine = make_engine(slots=2)
    reports = run(engine, [make_request("broken/0", colour=3), make_request("sound/0")])
    assert isinstance(failed(reports)["broken/0"].error, NumericalError)
    assert len(failed(reports[:1])) == 1
    np.testing.assert_array_equal(finished(reports)["sound/0"].latent, alone.latent)
    after = run(engine, [make_request("b/0"), make_request("c/0")])  # one of them in the broken one's slot
    for name in ("b/0", "c/0"):
        np.testing.assert_array_equal(finished(after)[name].latent, alone.latent)


def test_out_of_memory_splits_the_batch_and_lowers_the_cap(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    requests = [make_request(f"{k}/0", seed=k, colour=k % 3) for k in range(4)]
    expected = finished(run(make_engine(), requests))
    backend = make_backend(memory_rows=3)
    engine = make_engine(backend)
    made = finished(run(engine, requests))
    assert engine.scheduler.max_rows == 2
    assert max(backend.batches) == 2
    for name, sample in expected.items():
        np.testing.assert_array_equal(made[name].latent, sample.latent)


def test_out_of_memory_goes_down_a_bucket(make_backend: Make, make_engine: Make, make_request: Make) -> None:
    backend = make_backend(buckets=(1, 2, 4, 8), memory_rows=4)
    engine = make_engine(backend)
    made = finished(run(engine, [make_request(f"{k}/0") for k in range(3)]))
    assert len(made) == 3
    assert set(backend.batches) <= {1, 2, 4}
    assert engine.scheduler.max_rows == 4


def test_out_of_memory_with_a_single_row_is_the_callers_and_loses_nothing(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend()
    engine = make_engine(backend)
    engine.add(make_request())
    engine.step()
    backend.memory_rows = 0
    with pytest.raises(MemoryError):
        engine.step()
    backend.memory_rows = 1
    np.testing.assert_array_equal(
        finished(run(engine))["a/0"].latent, finished(run(make_engine(), [make_request()]))["a/0"].latent
    )


def test_hand_back_names_what_was_running_and_frees_it(make_engine: Make, make_request: Make) -> None:
    engine = make_engine()
    engine.add(make_request("a/0"))
    engine.add(make_request("b/0"))
    engine.step()
    assert engine.hand_back() == ("a/0", "b/0")
    assert engine.idle
    assert engine.free_samples == 16
    assert engine.step() == StepReport()


def test_a_full_pool_and_a_second_sample_of_one_id_are_refused(make_engine: Make, make_request: Make) -> None:
    engine = make_engine(slots=1)
    engine.add(make_request("a/0"))
    with pytest.raises(ValueError, match="running already"):
        engine.add(make_request("a/0"))
    with pytest.raises(ValueError, match="no free slot"):
        engine.add(make_request("b/0"))
