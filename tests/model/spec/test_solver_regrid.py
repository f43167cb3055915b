"""A running sample goes on along another grid, or with another solver, as if it had always done so."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import Schedule, make_schedule
from ditserve.model.spec.grids import grid_names, noise_levels_from
from ditserve.model.spec.solvers import step_table, trajectory
from tests.model.spec.solver_cases import (
    COLUMNS,
    DETERMINISTIC,
    START,
    bent,
    draws,
    gaussian,
    grids,
    legal_eta,
    marginal_std,
    run,
    schedules,
    splicing,
)


def spliced(data: st.DataObject, schedule: Schedule) -> tuple[tuple[float, ...], int, tuple[float, ...]]:
    """Draw a grid, the number of its steps that are done, and a new grid for the rest."""
    levels = data.draw(grids(schedule).filter(lambda values: len(values) > 1))
    done = data.draw(st.integers(1, len(levels) - 1))
    steps, kind = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(grid_names(schedule)))
    return levels, done, noise_levels_from(levels[done], steps, kind, schedule)


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules, splicing, st.floats(0.0, 1.0))
def test_a_regridded_table_is_the_tail_of_the_table_of_the_spliced_grid(
    data: st.DataObject, schedule: Schedule, solver: str, eta: float
) -> None:
    timesteps, done, rest = spliced(data, schedule)
    eta = legal_eta(solver, eta)
    fresh = step_table(solver, (*timesteps[:done], *rest), schedule, eta=eta)
    again = step_table(solver, rest, schedule, eta=eta, previous=timesteps[done - 1])
    for column in COLUMNS:
        np.testing.assert_allclose(getattr(again, column), getattr(fresh, column)[done:], rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules, splicing)
def test_a_regridded_sample_is_a_fresh_run_of_the_spliced_grid(
    data: st.DataObject, schedule: Schedule, solver: str
) -> None:
    timesteps, done, rest = spliced(data, schedule)
    fresh = run(
        step_table(solver, (*timesteps[:done], *rest), schedule), START, bent, noise=draws(5), clip_x0=True
    )
    noise = draws(5)
    first = trajectory(step_table(solver, timesteps, schedule), START, bent, noise=noise, clip_x0=True)
    x, denoised = [next(first) for _ in range(done)][-1]
    tail = step_table(solver, rest, schedule, previous=timesteps[done - 1])
    again = run(tail, x, bent, noise=noise, clip_x0=True, previous=denoised)
    np.testing.assert_allclose(again, fresh[done:], rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data(), schedules)
def test_unipc_2_goes_on_as_dpm_solver_and_corrects_from_its_own_second_step(
    data: st.DataObject, schedule: Schedule
) -> None:
    levels, done, rest = spliced(data, schedule)
    again, predictor = (
        step_table(solver, rest, schedule, previous=levels[done - 1]) for solver in ("unipc-2", "dpmpp-2m")
    )
    fresh = step_table("unipc-2", (*levels[:done], *rest), schedule)
    for column in COLUMNS:
        ours = getattr(again, column)
        assert ours[0] == getattr(predictor, column)[0]
        np.testing.assert_allclose(ours[1:], getattr(fresh, column)[done + 1 :], rtol=1e-9, atol=1e-12)


def test_unipc_never_corrects_a_step_that_another_table_took() -> None:
    """Not even a step of its own kind: the table cannot know it, and a second correction would spoil it."""
    schedule = make_schedule("cosine")
    fresh, again = (step_table("unipc-1", (500, 250), schedule, previous=before) for before in (None, 700))
    assert again.c[0] == 0
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(again, column), getattr(fresh, column))


def test_history_keeps_second_order_at_the_first_step_of_a_new_grid() -> None:
    schedule = make_schedule("linear", prediction="x0")
    network = gaussian(schedule, 2.0)
    at_720, at_700, exact = (marginal_std(schedule, t, 2.0) for t in (720, 700, 640))  # one exact solution
    rest = (700, 640, 580)
    kept = run(
        step_table("dpmpp-2m", rest, schedule, previous=720), at_700, network, previous=network(at_720, 720)
    )
    lost = run(step_table("dpmpp-2m", rest, schedule), at_700, network)
    assert abs(kept[0] - exact) < 0.3 * abs(lost[0] - exact)


@pytest.mark.parametrize("order", list(permutations(DETERMINISTIC, 3)))
def test_a_sample_may_change_its_solver_on_the_way(order: tuple[str, ...]) -> None:
    """The history of every solver serves every other."""
    schedule = make_schedule("cosine", prediction="x0")
    std, network = 0.5, gaussian(schedule, 0.5)
    exact = std / marginal_std(schedule, 999, std)
    x: Any = 1.0
    denoised: Any = None
    previous: float | None = None
    grids = [tuple(range(999, 700, -10)), tuple(range(699, 400, -10)), tuple(range(399, 0, -10))]
    for solver, timesteps in zip(order, grids, strict=True):
        rest = (*timesteps, *((timesteps[-1] - 10,) if timesteps[-1] >= 10 else ()))
        steps = trajectory(
            step_table(solver, rest, schedule, previous=previous), x, network, previous=denoised
        )
        for _ in timesteps:
            x, denoised = next(steps)
        previous = timesteps[-1]
    assert x == pytest.approx(exact, rel=0.05)
