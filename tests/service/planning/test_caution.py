"""Caution: the margin rises with broken promises, rests at the target, and falls when nothing is seen."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.planning.caution import MOST, TARGET, Caution
from tests.service.planning.machine import quick


def test_it_is_as_in_the_worked_example() -> None:
    caution = Caution(1.1)
    assert caution.margin(0.0) == 1.1
    for _ in range(2):
        caution.observe(False, 0.0)
    assert caution.margin(0.0) == pytest.approx(1.296)
    for _ in range(49):
        caution.observe(True, 0.0)
    assert caution.margin(0.0) == pytest.approx(1.198)
    assert caution.margin(60.0) == pytest.approx(1.136, abs=0.001)


def test_the_target_is_met_on_a_machine_that_is_slower_than_predicted() -> None:
    """A promise is broken if the machine is slower than its prediction by more than the margin."""
    caution, noise = Caution(1.1), random.Random(3)
    broken = []
    for k in range(20_000):
        now = 0.01 * k
        kept = noise.lognormvariate(0.0, 0.3) < caution.margin(now)
        broken.append(not kept)
        caution.observe(kept, now)
    assert sum(broken[2000:]) / len(broken[2000:]) < 1.5 * TARGET
    assert caution.margin(200.0) < 2.2


@quick
@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 1e6)), max_size=100), st.floats(0.0, 1e9))
def test_it_stays_within_its_bounds(observed: list[tuple[bool, float]], now: float) -> None:
    caution = Caution(1.1)
    for kept, at in observed:
        caution.observe(kept, at)
    assert 1.1 <= caution.margin(now) <= MOST
