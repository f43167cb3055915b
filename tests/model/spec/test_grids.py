"""Timestep grids, also for the rest of a sample: every number of steps, and those of diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import Schedule, make_schedule
from ditserve.model.spec.grids import GRIDS, choose_grid, fits, grid, regrid
from ditserve.model.spec.solvers import SOLVERS, step_table
from tests.model.spec.solver_cases import Network, run

reference: Any = diffusers  # untyped
# The grids of every number of steps; "ddim-stride" has some only.
EVERY = sorted(GRIDS.keys() - {"ddim-stride"})
kinds = st.sampled_from(EVERY)

LINEAR = make_schedule("linear")


@st.composite
def grid_sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Draw (steps, timesteps) with 1 <= steps <= timesteps."""
    timesteps = draw(st.integers(1, 1200))
    return draw(st.integers(1, timesteps)), timesteps


@settings(max_examples=40, deadline=None)
@given(kinds, grid_sizes())
def test_every_number_of_steps_gives_a_legal_grid(kind: str, size: tuple[int, int]) -> None:
    steps, timesteps = size
    values = grid(kind, steps, timesteps)
    assert len(values) == steps
    assert all(a > b for a, b in pairwise(values))
    assert 0 <= values[-1] <= values[0] < timesteps
    assert all(type(value) is int for value in values)


@pytest.mark.parametrize("kind", EVERY)
def test_every_step_count_of_a_thousand_is_legal_and_all_of_them_is_every_timestep(kind: str) -> None:
    for steps in range(1, 1001):
        values = grid(kind, steps)
        assert len(set(values)) == steps
        assert 0 <= min(values) <= max(values) <= 999
    assert grid(kind, 1000) == tuple(range(999, -1, -1))


@pytest.mark.parametrize(
    ("kind", "steps", "ends"),
    [
        ("leading", 4, (750, 500, 250, 0)),
        ("trailing", 4, (999, 749, 499, 249)),
        ("uniform-t", 4, (999, 749, 500, 250)),
        ("leading", 50, (980, 960, 20, 0)),
        ("leading", 20, (950, 900, 50, 0)),
        ("leading", 16, (930, 868, 62, 0)),
        ("trailing", 50, (999, 979, 39, 19)),
        ("trailing", 10, (999, 899, 199, 99)),
        ("uniform-t", 50, (999, 979, 40, 20)),
        ("uniform-t", 10, (999, 899, 200, 100)),
        ("linspace", 50, (999, 979, 20, 0)),
        ("respaced", 50, (999, 979, 20, 0)),
        ("ddim-stride", 50, (980, 960, 20, 0)),
        ("ddim-stride", 16, (945, 882, 63, 0)),
    ],
)
def test_grids_are_the_ones_in_use(kind: str, steps: int, ends: tuple[int, ...]) -> None:
    values = grid(kind, steps)
    assert (*values[:2], *values[-2:]) == ends


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy 2
@pytest.mark.parametrize("steps", [1, 4, 7, 10, 16, 20, 30, 50, 100, 333, 500])
def test_grids_agree_with_diffusers(steps: int) -> None:
    for spacing in ("leading", "trailing"):
        scheduler = reference.DDIMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        assert grid(spacing, steps) == tuple(scheduler.timesteps.tolist())
    multistep = reference.DPMSolverMultistepScheduler(timestep_spacing="linspace")
    multistep.set_timesteps(steps)
    assert grid("uniform-t", steps) == tuple(multistep.timesteps.tolist())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy 2
@pytest.mark.parametrize("steps", [2, 3, 21, 50, 333, 999])
def test_linspace_is_that_of_diffusers(steps: int) -> None:
    scheduler = reference.DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert grid("linspace", steps) == tuple(scheduler.timesteps.tolist())


def published_respacing(steps: int, total: int) -> list[int]:
    """Return the timesteps of the published DDPM sampling: one section, and a stride that need not be whole.

    Rebuilt from its description: the strides are added up, and each sum is rounded.
    """
    stride, position, timesteps = (total - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        timesteps.append(round(position))
        position += stride
    return timesteps


def test_respaced_is_the_published_ddpm_sampling() -> None:
    for steps in range(2, 1001):
        assert grid("respaced", steps) == tuple(reversed(published_respacing(steps, 1000)))
    assert grid("respaced", 1) == grid("linspace", 1) == (999,)


def published_strides(total: int) -> dict[int, tuple[int, ...]]:
    """Return the timesteps of the published DDIM sampling for each count that a whole stride gives."""
    grids: dict[int, tuple[int, ...]] = {}
    for stride in range(1, total + 1):
        timesteps = range(0, total, stride)
        grids.setdefault(len(timesteps), tuple(reversed(timesteps)))
    return grids


@pytest.mark.parametrize("total", [7, 300, 1000])
def test_ddim_stride_is_the_published_ddim_sampling_and_has_its_counts(total: int) -> None:
    published = published_strides(total)
    for steps in range(1, total + 1):
        if steps in published:
            assert grid("ddim-stride", steps, total) == published[steps]
        else:
            with pytest.raises(ValueError, match=f"visits {steps} of {total} timesteps: take") as refusal:
                grid("ddim-stride", steps, total)
            counts = [int(word) for word in str(refusal.value).split() if word.isdecimal()]
            assert all(count in published for count in counts[2:])


def test_an_explicit_grid_is_taken_as_written() -> None:
    assert grid("999,700,300", 3) == (999, 700, 300)
    assert grid("12", 1) == (12,)


@pytest.mark.parametrize(
    ("kind", "steps", "message"),
    [
        ("cosine", 10, "grid must be one of leading, .*, ddim-stride or comma-separated"),
        ("", 1, "grid must be one of"),
        ("leading", 0, r"in 1\.\.1000"),
        ("leading", 1001, r"in 1\.\.1000"),
        ("999,700", 3, "has 2 timesteps, but 3 steps"),
        ("700,999", 2, "strictly decreasing"),
        ("700,700", 2, "strictly decreasing"),
        ("1000,700", 2, r"in 0\.\.999"),
        ("5,-1", 2, r"in 0\.\.999"),
    ],
)
def test_an_impossible_grid_is_refused_in_one_sentence(kind: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(kind, steps)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([*GRIDS, "1100,900,850,300,20,3"]), st.integers(0, 1199))
def test_a_regrid_starts_where_the_sample_is_with_the_steps_asked_for(
    data: st.DataObject, kind: str, reached: int
) -> None:
    steps = data.draw(st.integers(1, reached + 1))
    values = regrid(reached, steps, kind, 1200)
    assert values[0] == reached
    assert len(values) == steps
    assert values[-1] >= 0
    assert all(a > b for a, b in pairwise(values))


@settings(max_examples=40, deadline=None)
@given(st.data(), kinds, grid_sizes())
def test_regridding_a_tail_with_as_many_steps_changes_nothing(
    data: st.DataObject, kind: str, size: tuple[int, int]
) -> None:
    timesteps = grid(kind, *size)
    done = data.draw(st.integers(0, len(timesteps) - 1))
    again = regrid(timesteps[done], len(timesteps) - done, kind, size[1])
    tolerance = 0 if kind == "leading" else 1
    assert max(abs(a - b) for a, b in zip(again, timesteps[done:], strict=True)) <= tolerance


@pytest.mark.parametrize(
    ("stated", "solver", "steps", "kind"),
    [
        ("leading", "ddim", 50, "leading"),
        ("leading", "ddim", 501, "respaced"),
        ("leading", "ddim", 112, "respaced"),
        ("leading", "ddim", 101, "respaced"),
        ("leading", "ddim", 1, "trailing"),
        ("leading", "ddpm", 50, "respaced"),
        ("leading", "dpmpp-2m", 10, "uniform-t"),
        ("leading", "unipc-1", 2, "uniform-t"),
        ("leading", "unipc-2", 10, "uniform-t"),
        ("ddim-stride", "ddim", 50, "ddim-stride"),
        ("ddim-stride", "ddim", 37, "respaced"),
        ("trailing", "dpmpp-2m", 10, "trailing"),
        ("trailing", "ddpm", 250, "trailing"),
        ("999,500", "ddim", 2, "999,500"),
        ("999,500", "ddim", 20, "trailing"),
        ("leading", "ddpm", 4, "trailing"),
        ("respaced", "ddim", 4, "trailing"),
    ],
)
def test_the_grid_follows_from_solver_and_steps_unless_the_stated_one_suits(
    stated: str, solver: str, steps: int, kind: str
) -> None:
    assert choose_grid(None, stated=stated, solver=solver, steps=steps, schedule=LINEAR) == kind


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_count_of_steps_has_a_grid_that_starts_at_the_noisy_end(solver: str) -> None:
    for total in (1, 2, 10, 1000):
        schedule = make_schedule("linear", total)
        for steps in range(1, total + 1):
            kind = choose_grid(None, stated="leading", solver=solver, steps=steps, schedule=schedule)
            first = grid(kind, steps, total)[0]
            assert total - 1 - first <= min(2 * total / steps, 0.25 * (total - 1))
            assert fits(kind, steps, schedule)


@pytest.mark.parametrize(
    ("wanted", "steps", "message"),
    [
        ("leading", 1, r"grid leading in 1 step starts at noise level 0 of 999, below the noise"),
        ("leading", 501, "grid leading in 501 steps starts at noise level 500"),
        ("ddim-stride", 2, "grid ddim-stride in 2 steps starts at noise level 500"),
        ("500,250", 2, "the grid starts at noise level 500"),
        ("ddim-stride", 37, "take 36 or 38 steps"),
        ("spiral", 10, "grid must be one of"),
    ],
)
def test_a_wanted_grid_that_starts_below_the_noisy_end_is_refused(
    wanted: str, steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_grid(wanted, stated="trailing", solver="ddim", steps=steps, schedule=LINEAR)


def mixture(schedule: Schedule) -> Network:
    """Return the exact noise prediction for data of 12 narrow normal distributions."""
    means = np.random.default_rng(0).uniform(-1.0, 1.0, (12, 8))

    def network(x: Any, t: float) -> Any:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = sigma**2 + 0.02 * alpha**2
        distance = x[:, None] - alpha * means  # (N, 12, 8)
        share = np.exp(-0.5 * np.square(distance).sum(2) / variance)
        image = means + 0.02 * alpha / variance * distance
        x0 = (share[:, :, None] * image).sum(1) / share.sum(1, keepdims=True)
        return (x - alpha * x0) / sigma

    return network


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc-1", "unipc-2"])
def test_more_steps_on_the_chosen_grid_are_no_cliff(solver: str) -> None:
    """Hold the error against all timesteps, for the published schedule, as the bundle of an import states."""
    schedule = make_schedule("linear")
    noise = np.random.default_rng(1).standard_normal((16, 8))
    truth = run(step_table("ddim", grid("trailing", 1000), schedule), noise, mixture(schedule))[-1]

    def error(steps: int) -> float:
        kind = choose_grid(None, stated="leading", solver=solver, steps=steps, schedule=LINEAR)
        image = run(step_table(solver, grid(kind, steps), schedule), noise, mixture(schedule))[-1]
        return float(np.sqrt(np.mean((image - truth) ** 2)))

    counts = [*range(1, 61), 75, 100, 101, 112, 150, 250, 251, 333, 500, 501]
    errors = [error(steps) for steps in counts]
    for fewer, more, before, after in zip(counts, counts[1:], errors, errors[1:], strict=False):
        assert after < 1.35 * before, (fewer, more)
    assert errors[counts.index(501)] < 0.003
    assert errors[0] < 0.7
    # The old default, "leading" for every solver, is worse where the choice differs from it.
    for steps in (1, 10, 16, 501) if solver in ("dpmpp-2m", "unipc-2") else (1, 501):
        old = run(step_table(solver, grid("leading", steps), schedule), noise, mixture(schedule))[-1]
        assert np.sqrt(np.mean((old - truth) ** 2)) > 1.1 * errors[counts.index(steps)], steps


def test_a_stated_grid_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="grid must be one of"):
        choose_grid(None, stated="spiral", solver="ddim", steps=10, schedule=LINEAR)


def test_an_explicit_grid_is_followed_as_a_curve() -> None:
    kind = "999,800,400,100"
    assert regrid(800, 3, kind, 1000) == (800, 400, 100)
    assert regrid(999, 2, kind, 1000) == (999, 400)
    assert regrid(900, 1, kind, 1000) == (900,)
    halves = regrid(999, 8, kind, 1000)
    assert halves[::2] == (999, 800, 400, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 5, "leading", 1000), r"remaining_from must be in 0\.\.999"),
        ((-1, 1, "leading", 1000), r"remaining_from must be in 0\.\.999"),
        ((4, 6, "trailing", 1000), r"steps must be in 1\.\.5 from 4 on"),
        ((4, 0, "trailing", 1000), r"steps must be in 1\.\.5"),
        ((4, 2, "spiral", 1000), "grid must be one of"),
        ((4, 2, "2000,3", 1000), "strictly decreasing"),
    ],
)
def test_an_impossible_regrid_is_refused_in_one_sentence(
    arguments: tuple[int, int, str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        regrid(*arguments)
