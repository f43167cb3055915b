"""Pace: what a machine does a second, and how slow it has been over short and over long times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.planning.pace import KEPT, SPELLS_S, STRETCH_S, PaceRecord, PaceWindow
from tests.service.planning.machine import quick


def test_the_window_is_as_in_the_worked_example() -> None:
    window = PaceWindow(2.0, passes=10)
    window.observe(0.1, 1.0)
    assert window.pace == pytest.approx(0.65, abs=0.005)


def test_the_record_is_as_in_the_worked_example() -> None:
    record = PaceRecord()
    for stretch in range(40):
        record.observe(0.5 * (0.25 if 10 <= stretch < 14 else 1.0), 0.5)
    slow = dict(record.slow())
    assert slow[1.0] == pytest.approx(0.25)
    assert slow[4.0] == pytest.approx(0.625)
    assert slow[32.0] == pytest.approx(0.925)


def test_nothing_is_said_before_a_stretch_is_over() -> None:
    record = PaceRecord()
    record.observe(0.1, STRETCH_S / 2)
    assert record.slow() == ()
    record.observe(0.1, STRETCH_S / 2)
    assert [over_s for over_s, _ in record.slow()] == list(SPELLS_S)


def test_a_pass_longer_than_a_stretch_fills_several() -> None:
    record = PaceRecord()
    record.observe(1.0, 4.0)
    assert dict(record.slow())[2.0] == pytest.approx(0.25)


def test_what_was_long_ago_is_forgotten() -> None:
    record = PaceRecord()
    record.observe(1.0, 100.0)
    record.observe(KEPT * STRETCH_S, KEPT * STRETCH_S)
    assert dict(record.slow())[1.0] == pytest.approx(1.0)


@quick
@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e4)), min_size=1, max_size=50))
def test_whatever_is_observed_every_pace_is_positive(passes: list[tuple[float, float]]) -> None:
    record = PaceRecord()
    for work_s, seconds in passes:
        record.observe(work_s, seconds)
    assert all(pace > 0 for _, pace in record.slow())
