"""The choice among measured points: the front of rows and two distances, and the defaults that follow."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditserve.model.evaluation.front import (
    WORTHWHILE,
    MeasuredPoint,
    OperatingPoint,
    best_defaults,
    front,
    nearer,
)
from ditserve.model.spec.manifest import RungSpec
from ditserve.model.train.load import DEFAULTS

NOISE = torch.tensor([0.01, -0.01] * 4)


def spec(rows: float, quality: float, own: float | None = None) -> RungSpec:
    return RungSpec(
        name="r", solver="ddim", steps=10, grid="trailing", rows=rows, quality=quality, own=own, real=quality
    )


def measured(steps: int, real: float, noise: Tensor = NOISE) -> MeasuredPoint:
    return MeasuredPoint(
        OperatingPoint("ddim", steps, "trailing", (0.1, 0.8)), 2 * steps, 1 / steps, real + noise
    )


specs = st.lists(
    st.builds(spec, st.integers(1, 200), st.floats(0.0, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=12
)


def test_the_front_keeps_what_nothing_cheaper_matches() -> None:
    best, good, bad, dear = spec(100, 0.1), spec(40, 0.2), spec(50, 0.3), spec(200, 0.1)
    assert front([good, dear, bad, best]) == (best, good)


def test_a_rung_must_save_something_worthwhile() -> None:
    assert [rung.rows for rung in front([spec(100, 0.1), spec(95, 0.2), spec(80, 0.3)])] == [100, 80]


def test_a_long_run_that_is_only_more_alike_to_itself_is_kept_and_not_called_better() -> None:
    long, short, shortest = spec(200, 0.3, 0.0), spec(40, 0.1, 0.2), spec(8, 0.2, 0.4)
    assert front([long, short, shortest]) == (short, shortest, long)


@given(specs)
@settings(max_examples=40, deadline=None)
def test_no_rung_of_the_front_is_beaten_and_what_is_left_out_costs_about_as_much(
    points: list[RungSpec],
) -> None:
    kept = front(points)
    assert [rung.quality for rung in kept] == sorted(rung.quality for rung in kept)
    for rung in kept:
        values = rung.rows, rung.quality, rung.own or 0.0
        for other in points:
            others = other.rows, other.quality, other.own or 0.0
            assert others == values or any(a > b for a, b in zip(others, values, strict=True))
    for candidate in points:
        beaten = any(
            other != candidate
            and other.rows <= candidate.rows
            and other.quality <= candidate.quality
            and (other.own or 0.0) <= (candidate.own or 0.0)
            for other in points
        )
        near = any(min(candidate.rows / r.rows, r.rows / candidate.rows) > WORTHWHILE for r in kept)
        assert beaten or near


def test_the_defaults_are_the_cheapest_point_as_near_to_real_pictures_as_any() -> None:
    nearest, as_near, far = measured(50, 0.1270), measured(20, 0.1276, NOISE.flip(0)), measured(4, 0.2)
    chosen = best_defaults([nearest, as_near, far], DEFAULTS)
    assert (chosen.steps, chosen.guidance_interval, chosen.guidance_scale) == (20, (0.1, 0.8), 2.0)
    assert best_defaults([nearest, measured(20, 0.14), far], DEFAULTS).steps == 50


def test_nearer_is_a_gain_beyond_its_noise() -> None:
    usual = torch.linspace(0.1, 0.2, 8)
    assert nearer(usual - 0.01, usual)
    assert not nearer(usual + NOISE - 0.001, usual)
