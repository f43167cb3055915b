"""A sample that is moved to another rung: before its first step, or from wherever it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ditserve.service.engine.samples import SampleRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.planner import LOAD, ROOM
from tests.service.engine.stepping import Floats, finished, previews, reference, run

Make = Callable[..., Any]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc-2"])
def test_a_trajectory_changed_under_way_continues_from_where_the_sample_stands(
    solver: str,
    make_backend: Make,
    make_engine: Make,
    make_request: Make,
    make_rung: Make,
    make_planner: Make,
) -> None:
    backend = make_backend()
    before = make_rung("dpmpp-2m", 10, "trailing")  # timesteps 999, 899, … 99
    after = make_rung(solver, 5, "trailing")
    request = make_request("a/0", rung=before)
    planner = make_planner([("a/0", 599, after, LOAD)])
    engine = make_engine(backend, planner=planner)
    reports = run(engine, [request, make_request("other/0")])
    made = finished(reports)["a/0"]
    pieces = [(before, (999, 899, 799, 699)), (after, (599, 399, 199))]
    np.testing.assert_allclose(made.latent, reference(backend, request, pieces)[0], atol=1e-4)
    assert (made.steps_used, made.rung, made.degraded, made.reason) == (7, after, True, LOAD)
    assert [change.sample_id for report in reports for change in report.changes] == ["a/0"]
    assert planner.seen[1][0].remaining_steps == 9


def test_a_composed_sample_keeps_its_conditions_on_a_lower_rung(
    make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    backend = make_backend()
    before, after = (
        replace(make_rung("dpmpp-2m", steps, "trailing"), guidance_decay=0.5) for steps in (10, 5)
    )
    terms = (ConditionTerm((0,), 2.0), ConditionTerm((1,), -0.5))
    request = make_request("a/0", rung=before, condition=terms, mix="compose", previews=3)
    engine = make_engine(backend, planner=make_planner([("a/0", 599, after, LOAD)]))
    reports = run(engine, [request, make_request("other/0")])
    pieces = [(before, (999, 899, 799, 699)), (after, (599, 399, 199))]
    expected, estimates = reference(backend, request, pieces)
    np.testing.assert_allclose(finished(reports)["a/0"].latent, expected, atol=1e-4)
    (early, late) = previews(reports)
    for preview in (early, late):
        np.testing.assert_allclose(preview.latent, estimates[preview.step - 1], atol=1e-4)


def test_a_trajectory_changed_before_the_first_step_is_a_fresh_one(
    make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    asked, given = make_rung(steps=10), make_rung("dpmpp-2m", 4, "uniform-t")
    fresh = finished(run(make_engine(), [make_request(rung=given)]))["a/0"]
    planner = make_planner([("a/0", 999, given, LOAD)])
    made = finished(run(make_engine(planner=planner), [make_request(rung=asked)]))["a/0"]
    np.testing.assert_array_equal(made.latent, fresh.latent)
    assert (made.steps_used, made.degraded, made.reason) == (4, True, LOAD)


def test_a_sample_that_climbs_back_before_its_first_step_is_not_degraded(
    make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    asked, given = make_rung(steps=10), make_rung(steps=4)
    request = replace(make_request(rung=asked), rung=given, reason=LOAD)
    made = finished(run(make_engine(planner=make_planner([("a/0", 999, asked, ROOM)])), [request]))["a/0"]
    assert (made.steps_used, made.degraded, made.reason) == (10, False, None)


def test_a_sample_that_climbs_back_under_way_says_why_it_was_cut(
    make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    asked, given = make_rung(steps=10), make_rung(steps=5)
    planner = make_planner([("a/0", 799, given, LOAD), ("a/0", 399, asked, ROOM)])
    made = finished(run(make_engine(planner=planner), [make_request(rung=asked)]))["a/0"]
    assert (made.rung, made.degraded, made.reason) == (asked, True, LOAD)
    assert 5 <= made.steps_used < 10


def test_a_stochastic_trajectory_change_keeps_drawing_from_the_samples_own_noise(
    make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    def made(company: list[SampleRequest]) -> Floats:
        planner = make_planner([("a/0", 699, make_rung("ddpm", 4), LOAD)])
        engine = make_engine(planner=planner)
        return finished(run(engine, [make_request(rung=make_rung("ddpm", 8)), *company]))["a/0"].latent

    company = [make_request(f"{k}/0", rung=make_rung("ddpm", 6), seed=k) for k in range(3)]
    np.testing.assert_array_equal(made([]), made(company))
