"""One step at a time: who takes part, what it leads to, and what goes wrong without harming the others."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.lib import tracemalloc_domain

from model.diffusion import guidance_weight, guided, make_schedule
from model.diffusion import grid as timestep_grid
from model.solvers import step_table
from service.engine import Engine
from service.errors import DeadlineExceeded, NumericalError
from service.jobs import ConditionTerm
from service.planner import LOAD, ROOM
from service.rungs import Rung
from service.samples import Failed, Finished, Preview, SampleRequest, StepReport

Floats = npt.NDArray[np.float32]
Make = Callable[..., Any]


def run(engine: Engine, requests: Iterable[SampleRequest] = ()) -> list[StepReport]:
    """Step until nothing runs."""
    for request in requests:
        engine.add(request)
    reports = []
    while not engine.idle:
        reports.append(engine.step())
        assert len(reports) < 1000
    return reports


def finished(reports: Iterable[StepReport]) -> dict[str, Finished]:
    return {each.id: each for report in reports for each in report.finished}


def failed(reports: Iterable[StepReport]) -> dict[str, Failed]:
    return {each.id: each for report in reports for each in report.failed}


def previews(reports: Iterable[StepReport]) -> list[Preview]:
    return [each for report in reports for each in report.previews]


def reference(
    backend: Any, request: SampleRequest, courses: Iterable[tuple[Rung, tuple[int, ...]]] | None = None
) -> tuple[Floats, list[Floats]]:
    """The same image by a plain loop over one sample in float64 tables: the latent, and the estimate after every step.

    `courses` lists (rung, timesteps) pieces that follow each other; by default it is the request's rung.
    """
    spec, config = backend.manifest.diffusion, backend.manifest.config
    schedule = make_schedule(spec.schedule, spec.timesteps, prediction=spec.prediction)
    rung = request.rung
    pieces = list(courses or [(rung, timestep_grid(rung.grid, rung.steps, spec.timesteps))])
    walked = [t for _, steps in pieces for t in steps]
    generator = np.random.Generator(np.random.Philox(request.seed))
    x = generator.standard_normal((1, config.in_channels, *config.image_size), dtype=np.float32)
    (colour,) = request.condition[0].labels
    classes = len(backend.manifest.factors[0].classes)
    labels = np.array([[classes if colour is None else colour], [classes]])
    embeddings = backend.embed(labels)
    estimates: list[Floats] = []
    for rung, steps in pieces:
        lead = len(estimates)
        table = step_table(rung.solver, walked[lead:], schedule, previous=walked[lead - 1] if lead else None)
        for i, t in enumerate(steps):
            state = backend.modulate(np.full(2, t, np.float32), embeddings)
            output = backend.denoise(np.repeat(x, 2, axis=0), state)[:, : config.in_channels]
            scale = guidance_weight(request.guidance_scale, t, spec.timesteps, rung.guidance_interval)
            mixed = (
                output[:1] if scale == 1.0 else guided(output[:1], output[1:], scale, spec.guidance_channels)
            )
            estimate = table.x0_x[i] * x + table.x0_out[i] * mixed
            estimate = np.clip(estimate, -1.0, 1.0) if spec.clip_x0 else estimate
            x = table.a[i] * x + table.b[i] * estimate + (table.c[i] * estimates[-1] if table.c[i] else 0.0)
            if table.s[i]:
                x = x + table.s[i] * generator.standard_normal(x.shape, dtype=np.float32)
            x = x.astype(np.float32)
            estimates.append(estimate.astype(np.float32))
    return x[0], [estimate[0] for estimate in estimates]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "dpmpp-2m"])
def test_a_sample_is_what_a_plain_loop_makes(
    solver: str, prediction: str, make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    backend = make_backend(prediction=prediction, clip_x0=True)
    request = make_request(rung=make_rung(solver, 12, "uniform-t", (0.2, 0.7)), guidance_scale=2.5)
    made = finished(run(make_engine(backend), [request]))["a/0"]
    np.testing.assert_allclose(made.latent, reference(backend, request)[0], atol=1e-4)
    assert made.steps_used == 12
    assert not made.degraded


def test_a_learned_variance_is_dropped_and_guidance_keeps_to_its_channels(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    plain = make_backend()
    config = replace(plain.manifest.config, learn_sigma=True)
    backend = make_backend(config=config, learn_sigma=True, guidance_channels=2)
    request = make_request(guidance_scale=3.0)
    made = finished(run(make_engine(backend), [request]))["a/0"]
    np.testing.assert_allclose(made.latent, reference(backend, request)[0], atol=1e-4)
    everywhere = finished(run(make_engine(plain), [request]))["a/0"]
    np.testing.assert_array_equal(made.latent[:2], everywhere.latent[:2])
    assert not np.array_equal(made.latent[2], everywhere.latent[2])


def test_guided_samples_have_two_rows_inside_their_interval_only(
    make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    rung = make_rung("ddim", 10, "trailing", (0.3, 0.7))  # timesteps 999, 899, … 99
    reports = run(make_engine(), [make_request(rung=rung)])
    assert [report.rows for report in reports] == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]
    assert [report.rows for report in run(make_engine(), [make_request(rung=rung, guidance_scale=1.0)])] == [
        1
    ] * 10


def test_guiding_the_null_class_costs_no_second_row(make_engine: Make, make_request: Make) -> None:
    reports = run(make_engine(), [make_request(colour=None)])
    assert {report.rows for report in reports} == {1}


def test_samples_join_and_leave_at_every_step(make_engine: Make, make_request: Make, make_rung: Make) -> None:
    engine = make_engine()
    engine.add(make_request("long/0", rung=make_rung(steps=6)))
    engine.step()
    engine.add(make_request("short/0", rung=make_rung("dpmpp-2m", 2), guidance_scale=1.0))
    assert engine.running == 2
    assert engine.progress() == {"long/0": (1, 6), "short/0": (0, 2)}
    assert engine.backlog_rows == 2 * 5 + 2
    assert engine.step().rows == 3
    assert [each.id for each in engine.step().finished] == ["short/0"]
    assert engine.step().rows == 2
    assert engine.free_samples == 15


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
    assert report.rows == 2
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


def test_previews_are_the_solvers_own_estimate(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend()
    request = make_request(previews=3)
    reports = run(make_engine(backend), [request])
    seen = previews(reports)
    assert [(each.step, each.steps) for each in seen] == [(3, 8), (6, 8)]
    _, estimates = reference(backend, request)
    for each in seen:
        np.testing.assert_allclose(each.latent, estimates[each.step - 1], atol=1e-4)
    assert sum(report.rows for report in reports) == 16  # no row more for them


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m"])
def test_a_course_changed_under_way_continues_from_where_the_sample_stands(
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
    courses = [(before, (999, 899, 799, 699)), (after, (599, 399, 199))]
    np.testing.assert_allclose(made.latent, reference(backend, request, courses)[0], atol=1e-4)
    assert (made.steps_used, made.rung, made.degraded, made.reason) == (7, after, True, LOAD)
    assert [change.sample_id for report in reports for change in report.changes] == ["a/0"]
    assert planner.seen[1][0].remaining_steps == 9


def test_a_course_changed_before_the_first_step_is_a_fresh_one(
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


def test_a_stochastic_course_change_keeps_drawing_from_the_samples_own_noise(
    make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    def made(company: list[SampleRequest]) -> Floats:
        planner = make_planner([("a/0", 699, make_rung("ddpm", 4), LOAD)])
        engine = make_engine(planner=planner)
        return finished(run(engine, [make_request(rung=make_rung("ddpm", 8)), *company]))["a/0"].latent

    company = [make_request(f"{k}/0", rung=make_rung("ddpm", 6), seed=k) for k in range(3)]
    np.testing.assert_array_equal(made([]), made(company))


def test_strict_runs_every_pass_at_one_size(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend()
    reports = run(make_engine(backend, strict=True, max_rows=6), [make_request()])
    assert {report.rows for report in reports} == {6}
    assert set(backend.batches) == {6}


def test_a_cap_of_one_row_runs_the_two_rows_of_a_guided_sample_one_after_the_other(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend()
    made = finished(run(make_engine(backend, max_rows=1), [make_request()]))["a/0"]
    assert set(backend.batches) == {1}
    np.testing.assert_array_equal(made.latent, finished(run(make_engine(), [make_request()]))["a/0"].latent)


def test_the_same_condition_mixed_in_any_order_makes_the_same_image(
    make_engine: Make, make_request: Make
) -> None:
    terms = (ConditionTerm((0,), 3.0), ConditionTerm((1,), 1.0), ConditionTerm((2,), 2.0))
    for mix in ("linear", "spherical"):
        a = make_request("a/0", condition=terms, mix=mix)
        b = make_request("b/0", condition=terms[::-1], mix=mix)
        made = finished(run(make_engine(), [a, b]))
        np.testing.assert_array_equal(made["a/0"].latent, made["b/0"].latent)


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


def test_reports_say_how_long_a_sample_waited_and_ran(make_engine: Make, make_request: Make) -> None:
    now = [1000.0]
    engine = make_engine(clock=lambda: now[0])
    engine.add(make_request())
    now[0] += 0.5
    for _ in range(8):
        report = engine.step()
        now[0] += 0.25
    made = report.finished[0]
    assert made.queue_ms == pytest.approx(500.0)
    assert made.denoise_ms == pytest.approx(7 * 250.0)


def test_warm_up_teaches_the_cost_model_and_respects_buckets(make_backend: Make, make_engine: Make) -> None:
    backend = make_backend(buckets=(2, 4, 8))
    engine = make_engine(backend)
    engine.warm_up()
    assert set(backend.batches) == {2, 4, 8}
    assert engine.costs.predict(1) < 0.1  # it was told 10 s
    quick = make_engine(make_backend())
    quick.warm_up(budget_s=0.0)
    assert quick.backend.batches == [1, 1]


def test_memory_does_not_grow_from_step_to_step(
    make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine()

    def live(rounds: int) -> int:
        """Bytes of arrays alive after so many rounds of four samples."""
        for k in range(rounds):
            run(engine, [make_request(f"{k}-{j}/0", seed=k, rung=make_rung(steps=5)) for j in range(4)])
        traces = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.DomainFilter(True, tracemalloc_domain)]
        )
        return sum(trace.size for trace in traces.traces)

    tracemalloc.start()
    try:
        before = live(2)
        assert live(10) == before
    finally:
        tracemalloc.stop()
