"""Several backbones in one engine: rungs name one for each part of the noise range."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.spec.stretches import Stretch
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import Finished, StepReport
from ditserve.service.errors import ModelReplaced
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Consent, Rung

Make = Callable[..., Any]
Floats = npt.NDArray[np.float32]

STUDENT = Stretch(0.0, "student", 0.25, guided=False)
LIGHT = Stretch(0.5, "light", 0.5)


@pytest.fixture
def engine_of(make_backend: Make, make_engine: Make) -> Callable[..., Engine]:
    """Give a function that builds an engine with a light backbone and a student."""

    def make(**options: Any) -> Engine:
        backbones = {"light": (make_backend(weights=2), 0.5), "student": (make_backend(weights=3), 0.25)}
        built: Engine = make_engine(make_backend(), backbones=backbones, **options)
        return built

    return make


def run(engine: Engine) -> tuple[list[StepReport], dict[str, Finished]]:
    reports = []
    while not engine.idle:
        reports.append(engine.step())
    return reports, {sample.id: sample for report in reports for sample in report.finished}


def by_hand(networks: Sequence[Any], scales: Sequence[float], rung: Rung, seed: int, colour: int) -> Floats:
    """Return the latent of DDIM, one network and one guidance scale a step, as plainly as possible."""
    schedule = networks[0].manifest.diffusion.noise_schedule()
    levels = noise_levels(rung.grid, rung.steps, schedule)
    table = step_table(rung.solver, levels, schedule)
    x = np.random.Generator(np.random.Philox(seed)).standard_normal((1, 3, 4, 6), np.float32)
    for k, (network, scale, level) in enumerate(zip(networks, scales, levels, strict=True)):
        told = np.full(1, level, np.float32)

        def predict(label: int, network: Any = network, told: Floats = told, x: Floats = x) -> Floats:
            state = network.modulate(told, network.embed(np.array([[label]])))
            output: Floats = network.denoise(x, state)
            return output

        output = predict(colour)
        if scale != 1.0:
            null = predict(len(network.manifest.factors[0].classes))
            output = null + np.float32(scale) * (output - null)
        _, x0_x, x0_out, a, b, *_ = (np.float32(column[k]) for column in table.columns)
        x = np.asarray(a * x + b * (x0_x * x + x0_out * output), np.float32)
    return np.asarray(x[0])


def test_each_step_runs_on_the_backbone_of_its_noise_level(
    make_backend: Make, engine_of: Make, make_request: Make, make_rung: Make
) -> None:
    own, light, student = (make_backend(weights=k) for k in (1, 2, 3))
    engine = engine_of()
    halves = make_rung(steps=6, stretches=(LIGHT,))
    few = make_rung(steps=3, stretches=(STUDENT,))
    engine.add(make_request("halves", rung=halves, colour=1))
    engine.add(make_request("few", rung=few, colour=1))
    reports, made = run(engine)
    # Levels of 999, 832, … : three of six are above the middle of the range.
    expected = by_hand([light] * 3 + [own] * 3, [2.0] * 6, halves, 7, 1)
    np.testing.assert_allclose(made["halves"].latent, expected, atol=2e-6)
    expected = by_hand([student] * 3, [1.0] * 3, few, 7, 1)
    np.testing.assert_allclose(made["few"].latent, expected, atol=2e-6)
    # A student takes one row a step, and rows of different networks share no pass.
    assert sorted(report.rows for report in reports) == [1] * 3 + [2] * 6


def test_a_sample_moves_to_the_student_on_its_way_and_its_answer_says_so(
    make_backend: Make, engine_of: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    full, few = make_rung(steps=6), make_rung(steps=2, stretches=(STUDENT,))
    engine = engine_of(planner=make_planner([("a/0", 500, few, "load")]))
    engine.add(make_request(rung=full, colour=1))
    reports, made = run(engine)
    assert [report.rows for report in reports] == [2, 2, 2, 1]
    assert (made["a/0"].rung, made["a/0"].degraded, made["a/0"].steps_used) == (few, True, 4)


def test_a_snapshot_between_two_backbones_is_continued_to_the_same_image(
    engine_of: Make, make_request: Make, make_rung: Make
) -> None:
    rung = make_rung("dpmpp-2m", 8, stretches=(Stretch(0.7, "student", 0.25, guided=False), LIGHT))
    request = make_request(rung=rung, colour=1, seed=3)
    whole = engine_of()
    whole.add(request)
    _, expected = run(whole)
    for taken in range(1, 8):
        first, second = engine_of(), engine_of()
        first.add(request)
        for _ in range(taken):
            first.step()
        second.add(request, first.export(request.id))
        _, made = run(second)
        np.testing.assert_array_equal(made[request.id].latent, expected[request.id].latent)


def test_a_rung_of_a_network_that_the_bundle_has_no_more_is_told_as_a_replaced_model(
    make_engine: Make, make_backend: Make, make_request: Make, make_rung: Make
) -> None:
    engine, few = make_engine(make_backend()), make_rung(steps=2, stretches=(STUDENT,))
    for rungs in ({"rung": few}, {"rung": make_rung(steps=2), "requested": few}):
        with pytest.raises(ModelReplaced, match="no network student any more"):
            engine.add(make_request(**rungs))
    assert engine.idle


def test_a_backbone_without_memory_for_a_row_of_the_own_size_is_told_like_the_own_one(
    make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine(make_backend(), backbones={"student": (make_backend(memory_rows=0), 0.25)})
    engine.add(make_request(rung=make_rung(steps=2, stretches=(STUDENT,))))
    with pytest.raises(MemoryError):
        engine.step()
    assert engine.running == 1


def test_warm_up_teaches_the_costs_of_every_backbone(engine_of: Make, make_request: Make) -> None:
    engine = engine_of(clock=time.monotonic)
    engine.warm_up(0.01)
    costs = [group.costs.predict(1) for group in engine._groups.lasting]
    assert len(costs) == 3
    assert max(costs) < 1.0  # the first guess was 10 s


def test_rows_count_by_the_cost_of_their_backbone(make_rung: Make) -> None:
    halves = make_rung(steps=8, grid="leading", stretches=(LIGHT,))
    few = make_rung(steps=4, stretches=(STUDENT,))
    ladder = Ladder([make_rung(steps=8), halves, few])
    assert ladder.row_steps(few, 2.0) == ladder.rows_left(few, 4, 1.0, guided=True) == 1.0
    assert ladder.rows_left(halves, 8, 1.0, guided=True) == 4 * 2 * 0.5 + 4 * 2
    assert ladder.rows_left(halves, 4, 0.5, guided=True) == 4 * 2
    # Grids need not divide the range evenly: the count of levels above the middle is what it is.
    assert ladder.row_steps(halves, 2.0) in (11.0, 12.0, 13.0)


def test_a_request_stays_on_the_own_backbone_where_no_other_can_draw_it(make_rung: Make) -> None:
    best = Rung("best", "ddim", 20, "trailing", (0.0, 1.0), 0.0)
    less = Rung("less", "ddim", 10, "trailing", (0.0, 1.0), 0.5)
    few = Rung("few", "ddim", 4, "trailing", (0.0, 1.0), 0.7, stretches=(STUDENT,))
    ladder = Ladder([best, less, few])
    assert ladder.below(best, Consent()) == (less, few)
    assert ladder.below(best, Consent(own_backbone=True)) == (less,)
    assert ladder.below(best, Consent(worst=0.6)) == (less,)
    assert ladder.below(best, Consent(min_steps=5)) == (less,)
    # A request for its solver and steps names the bundle's own network.
    assert ladder.requested("ddim", 4, "trailing", (0.0, 1.0), guided=True).stretches == ()
    assert ladder.descent(Consent()) == (best, less, few)
    assert ladder.descent(Consent(own_backbone=True)) == (best, less)
    assert ladder.descent(Consent(worst=-1.0)) == ()
