"""Timestep grids, also for the rest of a sample: every number of steps, and those of diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.grids import GRIDS, grid, regrid

reference: Any = diffusers  # untyped
kinds = st.sampled_from(sorted(GRIDS))


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


@pytest.mark.parametrize("kind", sorted(GRIDS))
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


def test_an_explicit_grid_is_taken_as_written() -> None:
    assert grid("999,700,300", 3) == (999, 700, 300)
    assert grid("12", 1) == (12,)


@pytest.mark.parametrize(
    ("kind", "steps", "message"),
    [
        ("cosine", 10, "grid must be one of leading, trailing, uniform-t or comma-separated"),
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
