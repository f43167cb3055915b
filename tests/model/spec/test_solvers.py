"""Solver tables: properties of all solvers, the learned variance, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import (
    PREDICTIONS,
    Prediction,
    Schedule,
    VariancePreserving,
    add_noise,
    make_schedule,
    training_target,
    variance_preserving,
)
from ditserve.model.spec.grids import GRIDS, grid
from ditserve.model.spec.solvers import SOLVERS, learned_log_variance, step_table, trajectory, variance_bounds
from tests.model.spec.solver_cases import (
    COLUMNS,
    DETERMINISTIC,
    START,
    bent,
    grids,
    legal_eta,
    oracle,
    run,
    schedules,
    solvers,
)


def test_the_worked_example_of_a_table() -> None:
    table = step_table("ddim", (1, 0), Schedule(VariancePreserving(np.array([0.64, 0.36]))))
    np.testing.assert_allclose(table.a, [0.75, 0.0], atol=1e-12)
    np.testing.assert_allclose(table.b, [0.35, 1.0], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules, solvers, st.floats(0.0, 1.0))
def test_every_step_keeps_the_signal_and_the_noise_at_the_levels_of_its_timestep(
    data: st.DataObject, schedule: Schedule, solver: str, eta: float
) -> None:
    levels = data.draw(grids(schedule))
    table = step_table(solver, levels, schedule, eta=legal_eta(solver, eta))
    assert len(table) == len(levels)
    assert tuple(table.level) == levels
    alpha, sigma = schedule.alpha(levels), schedule.sigma(levels)
    next_alpha, next_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    np.testing.assert_allclose(table.a * alpha + table.b + table.c + table.d, next_alpha, atol=1e-13)
    np.testing.assert_allclose(table.a**2 * sigma**2 + table.s**2, next_sigma**2, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules, solvers, st.floats(0.0, 1.0))
def test_the_last_step_gives_the_clean_image_and_the_first_needs_no_history(
    data: st.DataObject, schedule: Schedule, solver: str, eta: float
) -> None:
    table = step_table(solver, data.draw(grids(schedule)), schedule, eta=legal_eta(solver, eta))
    assert (table.a[-1], table.b[-1], table.c[-1], table.d[-1], table.s[-1]) == (0.0, 1.0, 0.0, 0.0, 0.0)
    assert table.c[0] == table.d[0] == 0.0
    for column in COLUMNS:
        values = getattr(table, column)
        assert values.dtype == np.float64
        assert np.all(np.isfinite(values))
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules, st.sampled_from(DETERMINISTIC))
def test_an_oracle_keeps_the_sample_on_the_line_from_noise_to_image(
    data: st.DataObject, schedule: Schedule, solver: str
) -> None:
    levels = data.draw(grids(schedule))
    x0, noise = np.random.default_rng(0).standard_normal((2, 16))
    x = add_noise(schedule.alpha(levels[0]), schedule.sigma(levels[0]), x0, noise)
    states = run(step_table(solver, levels, schedule), x, oracle(schedule, x0, noise))
    rounding = 1e-13
    if schedule.prediction == "epsilon":
        # The first estimate of the image divides the rounding of x by alpha.
        rounding /= float(schedule.alpha(levels[0]))
    for t, state in zip((*levels[1:], schedule.process.clean), states, strict=True):
        expected = add_noise(schedule.alpha(t), schedule.sigma(t), x0, noise)
        np.testing.assert_allclose(state, expected, atol=rounding)


@pytest.mark.parametrize("kind", sorted(GRIDS.keys() - {"ddim-stride"}))
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_an_oracle_recovers_the_image_for_any_number_of_steps(solver: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal(4)
    for schedule in (make_schedule(k, prediction=p) for k in ("linear", "cosine") for p in PREDICTIONS):

        def network(x: Any, t: float, schedule: Schedule = schedule) -> Any:
            noise = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
            return training_target(schedule.prediction, schedule.alpha(t), schedule.sigma(t), x0, noise)

        # Many steps take long: of one kind of prediction alone.
        many = (250, 1000) if schedule.prediction == "epsilon" else ()
        for steps in (1, 2, 3, 10, 37, *many):
            table = step_table(solver, grid(kind, steps), schedule)
            states = run(table, rng.standard_normal(4), network, noise=lambda: rng.standard_normal(4))
            np.testing.assert_allclose(states[-1], x0, atol=1e-10)


@pytest.mark.parametrize("steps", [2, 50, 250, 1000])
def test_variance_bounds_are_those_of_the_respaced_process(steps: int) -> None:
    schedule = make_schedule("linear")
    timesteps = grid("leading", steps)
    kept = variance_preserving("linear").alpha_bar[list(reversed(timesteps))]
    before = np.append(1.0, kept[:-1])
    betas = 1.0 - kept / before
    posterior = betas * (1.0 - before) / (1.0 - kept)
    low, high = variance_bounds(timesteps, schedule)
    np.testing.assert_allclose(high[::-1], np.log(betas), rtol=1e-9)
    np.testing.assert_allclose(low[::-1], np.log(np.append(posterior[1], posterior[1:])), rtol=1e-9)
    assert np.all(low[:-1] < high[:-1])


def test_a_single_step_learns_no_range() -> None:
    low, high = variance_bounds((999,), make_schedule("linear"))
    np.testing.assert_array_equal(low, high)


def test_a_learned_variance_goes_from_the_posterior_to_beta_in_numpy_and_torch() -> None:
    low, high = variance_bounds(grid("leading", 10), make_schedule("linear"))
    np.testing.assert_allclose(learned_log_variance(-np.ones(10), low, high), low)
    np.testing.assert_allclose(learned_log_variance(np.ones(10), low, high), high)
    middle = learned_log_variance(torch.zeros(10, dtype=torch.float64), torch.tensor(low), torch.tensor(high))
    np.testing.assert_allclose(middle.numpy(), (low + high) / 2)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_torch_and_numpy_agree_in_float32(solver: str, prediction: Prediction) -> None:
    schedule = make_schedule("cosine", prediction=prediction)
    table = step_table(solver, grid("uniform-t", 20), schedule)
    x = START.astype(np.float32)
    noise_rng, torch_rng = np.random.default_rng(1), np.random.default_rng(1)

    def noise() -> npt.NDArray[np.float32]:
        return noise_rng.standard_normal((2, 4), dtype=np.float32)

    def torch_noise() -> torch.Tensor:
        return torch.from_numpy(torch_rng.standard_normal((2, 4), dtype=np.float32))

    ours = run(table, x, bent, noise=noise, clip_x0=True)
    others = run(table, torch.from_numpy(x), bent, noise=torch_noise, clip_x0=True)
    assert {state.dtype for state in ours} == {np.dtype(np.float32)}
    assert {state.dtype for state in others} == {torch.float32}
    np.testing.assert_allclose(ours, [state.numpy() for state in others], atol=1e-3)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_float32_survives_the_almost_signal_free_end_of_the_cosine_schedule(solver: str) -> None:
    schedule = make_schedule("cosine", prediction="epsilon")
    x0, noise = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    timesteps = grid("trailing", 250)
    x = add_noise(np.float32(schedule.alpha(999)), np.float32(schedule.sigma(999)), x0, noise)
    states = run(step_table(solver, timesteps, schedule), x, oracle(schedule, x0, noise))
    np.testing.assert_allclose(states[-1], x0, atol=1 / 255)  # half a level of an 8-bit pixel


def test_clipping_holds_every_estimate_of_the_image_inside_its_range() -> None:
    schedule = make_schedule("linear")
    table = step_table("dpmpp-2m", grid("trailing", 10), schedule)
    clipped = [denoised for _, denoised in trajectory(table, START, bent, clip_x0=True)]
    free = [denoised for _, denoised in trajectory(table, START, bent)]
    assert np.abs(clipped).max() <= 1.0 < np.abs(free).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"solver": "heun"},
            "solver must be one of ddim, ddpm, euler, dpmpp-2m, unipc-1, unipc-2, not 'heun'",
        ),
        ({"grid": ()}, "one or more noise levels"),
        ({"grid": (5, 5)}, "decrease strictly"),
        ({"grid": (5, 9)}, "decrease strictly"),
        ({"grid": (1000, 5)}, "above -1 and at most 999"),
        ({"grid": (5, -1)}, "above -1 and at most 999"),
        ({"eta": 1.5}, r"eta must be in 0\.\.1"),
        ({"eta": float("nan")}, r"eta must be in 0\.\.1"),
        ({"solver": "euler", "eta": 0.5}, "fixes eta at 0"),
        ({"solver": "ddpm", "eta": 0.5}, "fixes eta at 1"),
        ({"previous": 500}, "above the first level of the grid, 500"),
        ({"previous": 1000}, "at most 999, not 1000"),
    ],
)
def test_an_impossible_table_is_refused_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    legal: dict[str, Any] = {"solver": "ddim", "grid": (500, 250), "schedule": make_schedule("linear")}
    with pytest.raises(ValueError, match=message):
        step_table(**(legal | arguments))


def test_a_trajectory_without_noise_or_history_that_it_needs_is_refused() -> None:
    schedule = make_schedule("linear")
    with pytest.raises(ValueError, match="this ddpm table is stochastic: pass noise"):
        run(step_table("ddpm", (500, 250), schedule), START, bent)
    with pytest.raises(ValueError, match="pass the previous estimate of the image"):
        run(step_table("dpmpp-2m", (500, 250), schedule, previous=600), START, bent)
