"""Rungs and ladders: what a rung costs, what is below it, and how many steps remain when a sample moves."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import make_schedule
from ditserve.model.spec.grids import grid
from ditserve.model.spec.guidance import forward_rows, guidance_weight
from ditserve.model.spec.stretches import Stretch
from ditserve.service.engine.trajectory import make_trajectory
from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.rung import Consent, Rung

quick = settings(max_examples=60, deadline=None)  # wall time says nothing on a shared machine


WHOLE = (0.0, 1.0)


def rung(
    solver: str, steps: int, quality: float, interval: tuple[float, float] = WHOLE, kind: str = "trailing"
) -> Rung:
    return Rung(f"{solver}-{steps}", solver, steps, kind, interval, quality)


SCHEDULE = make_schedule("linear")
LADDER = Ladder(
    [rung("dpmpp-2m", 10, 0.3), rung("ddim", 50, 0.0), rung("ddim", 20, 0.2), rung("dpmpp-2m", 6, 0.9)]
)

rungs = st.builds(
    rung,
    st.sampled_from(["ddim", "dpmpp-2m"]),
    st.integers(1, 100),
    st.floats(0, 10),
    st.sampled_from([WHOLE, (0.1, 0.8), (0.3, 0.6)]),
    st.sampled_from(["leading", "trailing", "uniform-t"]),
)
# Costs are sums of powers of two, so that sums of them are exact.
STRETCHES: list[tuple[Stretch, ...]] = [
    (Stretch(0.0, "student", 0.25, guided=False),),
    (Stretch(0.6, "light", 0.5),),
    (Stretch(0.7, ""), Stretch(0.3, "middle", 0.75), Stretch(0.0, "light", 0.5)),
    (Stretch(0.5, "student", 0.25, guided=False), Stretch(0.2, "light", 0.5)),
]
strengths = st.sampled_from([1.0, 1.0, 0.55, 0.3, 1e-9])
stitched = st.builds(replace, rungs, stretches=st.sampled_from([(), *STRETCHES]), strength=strengths)


def test_rungs_are_best_first() -> None:
    assert [rung.name for rung in LADDER.rungs] == ["ddim-50", "ddim-20", "dpmpp-2m-10", "dpmpp-2m-6"]


def test_a_request_on_the_ladder_is_that_rung() -> None:
    assert LADDER.requested("ddim", 20, "trailing", WHOLE, True) is LADDER.rungs[1]


def test_an_unguided_request_matches_whatever_its_guidance_interval() -> None:
    assert LADDER.requested("ddim", 20, "trailing", (0.2, 0.3), False) is LADDER.rungs[1]
    assert LADDER.requested("ddim", 20, "trailing", (0.2, 0.3), True) not in LADDER.rungs


def test_a_request_between_rungs_has_a_quality_between_theirs() -> None:
    between = LADDER.requested("ddim", 30, "trailing", WHOLE, True)
    assert 0.0 < between.quality < 0.2
    assert LADDER.requested("ddim", 100, "trailing", WHOLE, True).quality == 0.0
    assert LADDER.requested("ddim", 3, "trailing", WHOLE, True).quality == 0.2


def test_an_unmeasured_solver_is_judged_by_the_whole_ladder() -> None:
    assert LADDER.requested("euler", 10, "trailing", WHOLE, True).quality == pytest.approx(0.3)


def test_an_empty_ladder_takes_every_request_and_offers_nothing_below() -> None:
    empty = Ladder([])
    asked = empty.requested("ddim", 20, "trailing", WHOLE, True)
    assert (asked.steps, asked.quality, empty.below(asked, Consent(1))) == (20, 0.0, ())


def test_below_respects_the_floor() -> None:
    assert [rung.steps for rung in LADDER.below(LADDER.rungs[0], Consent(10))] == [20, 10]
    assert LADDER.below(LADDER.rungs[0], Consent(51)) == ()


def test_below_has_the_decay_of_the_request() -> None:
    asked = LADDER.requested("ddim", 20, "trailing", WHOLE, True, decay=0.75)
    assert (asked.name, asked.quality, asked.guidance_decay) == ("ddim-20", 0.2, 0.75)
    assert LADDER.below(asked, Consent(1))
    assert {rung.guidance_decay for rung in LADDER.below(asked, Consent(1))} == {0.75}


def test_below_never_guides_where_the_request_does_not() -> None:
    ladder = Ladder([rung("ddim", 50, 0.0), rung("ddim", 20, 0.2, (0.1, 0.9))])
    asked = ladder.requested("ddim", 50, "trailing", (0.3, 1.0), True)
    (lower,) = ladder.below(asked, Consent(1))
    assert lower.guidance_interval == (0.3, 0.9)


@quick
@given(st.lists(stitched, max_size=8), stitched, st.integers(1, 60))
def test_below_gets_cheaper_and_worse(ladder_rungs: list[Rung], asked: Rung, floor: int) -> None:
    ladder = Ladder(ladder_rungs)
    chain = ladder.below(asked, Consent(floor))
    rows = [ladder.row_steps(rung, 2.0) for rung in (asked, *chain)]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) == len(rows)
    assert [rung.quality for rung in chain] == sorted(rung.quality for rung in chain)
    assert all(rung.walked >= floor for rung in chain)
    assert all(rung.strength == asked.strength for rung in chain)


@quick
@given(stitched, st.sampled_from([0.0, 1.0, 2.5]), st.integers(1, 8), st.floats(-20, 20))
def test_rows_are_counted_along_the_grid(asked: Rung, scale: float, conditions: int, decay: float) -> None:
    asked = replace(asked, guidance_decay=decay)
    trajectory = make_trajectory(asked, scale, SCHEDULE)
    assert LADDER.row_steps(asked, scale, conditions) == trajectory.rows_from(0, conditions)


def test_a_weight_that_decays_to_one_needs_no_row() -> None:
    """The engine holds the weight in float32, where this one is 1 at the step at timestep 500."""
    decaying = Rung("ddim-2", "ddim", 2, "999,500", WHOLE, 0.0, guidance_decay=2 * log(2.0))
    trajectory = make_trajectory(decaying, 2.0, SCHEDULE)
    assert trajectory.guided == (True, False)
    assert LADDER.row_steps(decaying, 2.0) == trajectory.rows_from(0) == 3


@quick
@given(rungs, st.data())
def test_rows_left_are_those_of_the_rest_of_the_grid(asked: Rung, data: st.DataObject) -> None:
    walked = grid("uniform-t", asked.steps, 1000)
    done = data.draw(st.integers(0, asked.steps - 1))
    rest = walked[done:]
    weights = [guidance_weight(2.0, t, SCHEDULE, asked.guidance_interval) for t in rest]
    exact = sum(2 if weight != 1.0 else 1 for weight in weights)
    left = LADDER.rows_left(asked, len(rest), rest[0] / 999, True)
    assert abs(left - exact) <= (0 if asked.guidance_interval == WHOLE else 2)
    assert LADDER.rows_left(asked, len(rest), rest[0] / 999, False) == len(rest)
    composed = LADDER.rows_left(asked, len(rest), rest[0] / 999, True, 3)
    assert composed == left + 2 * len(rest)


@quick
@given(rungs, st.sampled_from(STRETCHES), st.booleans(), st.integers(1, 3), st.data())
def test_rows_left_on_several_backbones_are_about_those_of_the_rest_of_the_grid(
    asked: Rung, stretches: tuple[Stretch, ...], guided: bool, conditions: int, data: st.DataObject
) -> None:
    asked = replace(asked, stretches=stretches)
    walked = grid("uniform-t", asked.steps, 1000)
    rest = walked[data.draw(st.integers(0, asked.steps - 1)) :]
    exact = forward_rows(
        rest,
        SCHEDULE,
        2.0 if guided else 1.0,
        asked.guidance_interval,
        conditions=conditions,
        stretches=stretches,
    )
    left = LADDER.rows_left(asked, len(rest), rest[0] / 999, guided, conditions)
    # A step may be on the other side of each end of a stretch, and of the guidance interval.
    assert abs(left - exact) <= (len(stretches) + 2) * (conditions + 1)
    whole = LADDER.rows_left(replace(asked, stretches=()), len(rest), rest[0] / 999, guided, conditions)
    # Shares of steps add up to the whole but for their rounding.
    assert left <= whole + 1e-9


@quick
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), strengths, st.data())
def test_steps_in_all_never_fall_below_the_fewest_of_the_rungs(
    counts: list[int], strength: float, data: st.DataObject
) -> None:
    """However often a sample moves, it takes at least as many steps as the lowest rung it was on."""
    current, *targets = [replace(rung("ddim", steps, 0.0), strength=strength) for steps in counts]
    fewest = min(rung.walked for rung in (current, *targets))
    remaining, taken = current.walked, 0
    for target in targets:
        walked = data.draw(st.integers(0, remaining - 1))
        taken, remaining = taken + walked, remaining - walked
        remaining, current = steps_left(remaining, current, target), target
        assert remaining >= 1
    assert taken + remaining >= fewest


@pytest.mark.parametrize(
    ("steps", "strength", "walked"),
    [
        (50, 0.3, 15),
        (10, 0.55, 6),
        (20, 1.0, 20),
        (100, 0.29, 29),
        (4, 0.01, 1),
        (1, 1e-300, 1),
        (10, 0.7, 7),
    ],
)
def test_the_share_that_is_walked_is_rounded_up(steps: int, strength: float, walked: int) -> None:
    assert replace(rung("ddim", steps, 0.0), strength=strength).walked == walked


def test_an_unstarted_sample_walks_the_whole_new_grid() -> None:
    assert steps_left(50, rung("ddim", 50, 0.0), rung("dpmpp-2m", 12, 0.1)) == 12
