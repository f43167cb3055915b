"""Caution: the margins rise with broken promises, and fall when nothing is seen."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.planning.caution import FIRST_QUEUE_MARGIN, MOST, Caution
from tests.service.planning.machine import quick

counts = st.integers(0, 99)


def watched(kept: int, broken: int, at: float = 0.0) -> Caution:
    caution = Caution(1.1)
    caution.observe(kept, broken, at)
    return caution


def test_it_is_as_in_the_worked_example() -> None:
    caution = watched(960, 20)
    assert caution.margin(0.0) == pytest.approx(2.0)
    assert caution.margin(60.0) == pytest.approx(1.97, abs=0.01)
    assert caution.margin(360.0) == 1.1


def test_the_margin_depends_on_the_share_and_not_on_the_number_of_promises() -> None:
    """Two processes that each hear of half of the promises are as careful as one that hears of all."""
    assert watched(9800, 200).margin(0.0) == pytest.approx(watched(4900, 100).margin(0.0), abs=0.01)


def test_a_hundred_kept_promises_a_second_do_not_make_it_forget() -> None:
    caution = watched(120, 40)
    for number in range(1000):
        caution.observe(1, 0, 1.0 + number / 100)
    assert caution.margin(11.0) > 2.0


def test_on_a_machine_slower_than_predicted_few_promises_are_broken() -> None:
    """A promise is broken if the machine is slower than its prediction by more than the margin."""
    caution, noise = Caution(1.1), random.Random(3)
    broken = []
    for number in range(20_000):
        now = 0.01 * number
        kept = noise.lognormvariate(0.0, 0.3) < caution.margin(now)
        broken.append(not kept)
        caution.observe(kept, not kept, now)
    assert sum(broken[2000:]) / len(broken[2000:]) < 0.03
    assert caution.margin(200.0) < 2.2


def test_a_queue_is_kept_short_until_the_machine_is_known() -> None:
    caution = Caution(1.1)
    assert caution.queue_margin(50.0) == FIRST_QUEUE_MARGIN
    caution.observe(1, 0, 50.0)
    assert 1.4 < caution.queue_margin(110.0) < 1.5
    assert caution.queue_margin(500.0) == pytest.approx(1.1, abs=0.001)
    assert caution.margin(50.0) == 1.1


@quick
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(0.0, 1e6)), max_size=50),
    st.floats(0.0, 1e9),
)
def test_it_stays_within_its_bounds(observed: list[tuple[int, int, float]], now: float) -> None:
    caution = Caution(1.1)
    for kept, broken, at in observed:
        caution.observe(kept, broken, at)
    assert 1.1 <= caution.margin(now) <= caution.queue_margin(now) <= MOST
