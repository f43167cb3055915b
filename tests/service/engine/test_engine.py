"""Steps of the engine: the samples that take part, and the results."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.lib import tracemalloc_domain

from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import Waits
from tests.service.engine.stepping import finished, previews, reference, run

Make = Callable[..., Any]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "dpmpp-2m", "unipc-2"])
def test_a_sample_is_what_a_plain_loop_makes(
    solver: str, prediction: str, make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    backend = make_backend(prediction=prediction, clip_x0=True)
    request = make_request(rung=make_rung(solver, 12, "uniform-t", (0.2, 0.7)), guidance_scale=2.5)
    made = finished(run(make_engine(backend), [request]))["a/0"]
    np.testing.assert_allclose(made.latent, reference(backend, request)[0], atol=1e-4)
    assert made.steps_used == 12
    assert not made.degraded


def test_guidance_keeps_to_its_channels_and_a_learned_variance_is_none_of_them(
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


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp-2m"])
def test_composed_conditions_and_decaying_guidance_are_those_of_a_plain_loop(
    solver: str, make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    config = replace(make_backend().manifest.config, learn_sigma=True)
    backend = make_backend(config=config, learn_sigma=True, guidance_channels=2, prediction="v")
    rung = replace(make_rung(solver, 10, "uniform-t", (0.15, 0.7)), guidance_decay=0.75)
    terms = (ConditionTerm((0,), 1.5), ConditionTerm((1,)), ConditionTerm((2,), -0.5))
    request = make_request(condition=terms, mix="compose", rung=rung, guidance_scale=3.0)
    reports = run(make_engine(backend), [request])
    np.testing.assert_allclose(
        finished(reports)["a/0"].latent, reference(backend, request)[0], rtol=1e-4, atol=1e-4
    )
    # A row for each condition, and one more at the steps inside the interval.
    assert [report.rows for report in reports] == [3] * 3 + [4] * 6 + [3]


def test_composed_conditions_of_a_larger_image_find_their_rows(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    """A single sample may have more rows than a pass, at the bundle's own size and at another."""
    terms = tuple(ConditionTerm((colour,)) for colour in (0, 1, 2, None, 0, 1, 2, 0))
    engine = make_engine(make_backend(size_multiple=2), max_rows=2)
    own = make_request("own/0", condition=terms, mix="compose")
    larger = replace(own, id="larger/0", size=(8, 6))
    made = finished(run(engine, [own, larger]))
    assert made["own/0"].latent.shape == (3, 4, 6)
    assert made["larger/0"].latent.shape == (3, 8, 6)


def test_a_sample_walks_the_noise_levels_that_are_listed(
    make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    backend = make_backend()
    request = make_request(rung=make_rung("dpmpp-2m", 4, "999,720,400,60"))
    made = finished(run(make_engine(backend), [request]))["a/0"]
    pieces = [(request.rung, (999, 720, 400, 60))]
    np.testing.assert_allclose(made.latent, reference(backend, request, pieces)[0], atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddpm_takes_the_learned_variance_of_a_model_that_has_one(
    prediction: str, make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    config = replace(make_backend().manifest.config, learn_sigma=True)
    backend = make_backend(config=config, learn_sigma=True, prediction=prediction)
    learned = make_request("learned/0", rung=make_rung("ddpm", 12, "respaced", (0.2, 0.7)))
    plain = make_request("plain/0", rung=make_rung("dpmpp-2m", 12, "trailing"))
    made = finished(run(make_engine(backend), [learned, plain]))
    for request in (learned, plain):
        expected = reference(backend, request)[0]
        np.testing.assert_allclose(made[request.id].latent, expected, atol=1e-4 * np.abs(expected).max())
    alone = finished(run(make_engine(backend), [learned]))["learned/0"]
    np.testing.assert_array_equal(alone.latent, made["learned/0"].latent)


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
    assert [sample.id for sample in engine.step().finished] == ["short/0"]
    assert engine.step().rows == 2
    assert engine.free_samples == 15


def test_previews_are_the_solvers_own_estimate(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend()
    request = make_request(previews=3)
    reports = run(make_engine(backend), [request])
    seen = previews(reports)
    assert [(preview.step, preview.steps) for preview in seen] == [(3, 8), (6, 8)]
    _, estimates = reference(backend, request)
    for preview in seen:
        np.testing.assert_allclose(preview.latent, estimates[preview.step - 1], atol=1e-4)
    assert sum(report.rows for report in reports) == 16  # no row more for them


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
    assert engine.costs.predict(1) < 0.1  # its first guess was 10 s
    quick = make_engine(make_backend())
    quick.warm_up(budget_s=0.0)
    assert quick.backend.batches == [1, 1]
    thorough = make_engine(make_backend(buckets=(1, 3, 8)))
    thorough.warm_up(budget_s=0.0)  # a bucket that is opened in service would keep a sample waiting
    assert thorough.backend.batches == [1, 1, 3, 3, 8, 8]
    narrow = make_engine(make_backend(buckets=(1, 3, 8), memory_rows=5))
    narrow.warm_up()
    assert narrow.scheduler.max_rows == 3


def test_the_first_pass_of_a_size_does_not_count(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    """It may take a hundred times as long: a cost model that believed it would have everybody refused."""
    now = [0.0]
    backend = make_backend()
    plain = backend.denoise

    def denoise(x: Any, state: Any) -> Any:
        now[0] += 0.01 if len(x) in backend.batches else 5.0
        return plain(x, state)

    backend.denoise = denoise
    engine = make_engine(backend, clock=lambda: now[0])
    engine.warm_up(budget_s=100.0)
    for name in ("a/0", "b/0"):
        engine.add(make_request(name, guidance_scale=1.0 if name == "a/0" else 2.0))
    while not engine.idle:
        engine.step()
    assert 3 in backend.batches  # a size the warm-up left out
    assert engine.costs.predict(3) == pytest.approx(0.01)


def test_waits_for_a_processor_are_told_to_the_cost_model(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    """In the warm-up, in the pass of a step, and beside it."""
    now, waited = [0.0], [0.0]
    backend = make_backend()
    plain = backend.denoise

    def denoise(x: Any, state: Any) -> Any:
        now[0] += 0.01 + 0.04
        waited[0] += 0.04
        return plain(x, state)

    backend.denoise = denoise
    engine = make_engine(backend, clock=lambda: now[0], waited=lambda: waited[0])
    engine.warm_up(budget_s=100.0)
    seconds = engine.costs.predict(1)
    assert seconds == pytest.approx(0.05, rel=0.2), "the pace is a fifth"
    observed: list[Any] = []
    learn = engine.costs.observe

    def observe(*step: float, waits: Waits, device_s: None) -> None:
        observed.append((*step, waits))
        learn(*step, waits=waits, device_s=device_s)

    engine.costs.observe = observe
    engine.add(make_request("a/0"))
    while not engine.idle:
        engine.step()
        now[0] += 0.03
        waited[0] += 0.02
    rows, turn_s, host_s, waits = observed[-1]
    assert (rows, turn_s, host_s) == (2, pytest.approx(0.08), pytest.approx(0.03))
    assert (waits.pass_s, waits.host_s) == (pytest.approx(0.04), pytest.approx(0.02))


def test_the_cost_of_a_step_is_the_whole_turn(make_engine: Make, make_request: Make) -> None:
    """A host that is slow between the passes delays every step as much as a slow network."""
    now = [1000.0]
    engine = make_engine(clock=lambda: now[0])
    for name in ("a/0", "b/0"):
        engine.add(make_request(name))
        while not engine.idle:
            report = engine.step()
            now[0] += 0.25
        assert report.seconds == 0.25
        now[0] += 3600.0  # idle time is not the cost of anything
    assert engine.costs.predict(2) == pytest.approx(0.25, rel=0.01)


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


UNKNOWN = ({"grid": "1,2,x"}, {"grid": "of-a-later-release"}, {"solver": "euler-9"})


@pytest.mark.parametrize("unknown", UNKNOWN, ids=str)
def test_a_rung_asked_for_that_is_none_is_refused_before_the_sample_joins(
    unknown: dict[str, str], make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=r"of-a-later-release|1,2,x|euler-9"):
        engine.add(make_request(requested=replace(make_rung(), **unknown)))
    assert engine.idle
    assert engine.demand() == ()
