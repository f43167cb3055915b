"""Returns: the refused are spread over the time they will be served in, and find room if they obey."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.planning import returns as returns_module
from ditserve.service.planning.returns import LATE_S, LEAST_S, MOST_S, Returns, _Return
from tests.service.planning.machine import quick


def obeyed() -> Returns:
    """Return returns whose callers were seen to come back."""
    returns = Returns()
    returns.share = 1.0
    return returns


def test_they_are_spread_as_in_the_worked_example() -> None:
    returns = obeyed()
    told = [returns.tell(k, 0.0, free_s=1.0, service_s=0.1) for k in range(25)]
    assert Counter(told) == {1: 1, 2: 10, 3: 10, 4: 4}
    assert told == sorted(told)


def test_who_comes_back_is_known_and_forgotten() -> None:
    returns = obeyed()
    (told,) = {returns.tell("a", 0.0, free_s=0.3, service_s=0.1)}
    assert told == LEAST_S
    assert not returns.came_back("a", 0.5)
    assert not returns.came_back("b", 1.0)
    assert returns.came_back("a", 1.0)
    assert not returns.came_back("a", 1.0)


def test_room_is_kept_for_those_who_are_due_and_no_longer_for_those_who_stay_away() -> None:
    returns = obeyed()
    for k in range(5):
        returns.tell(k, 0.0, free_s=3.0, service_s=0.1)
    assert returns.reserved_s(1.0) == 0.0
    assert returns.reserved_s(2.5) == pytest.approx(0.5)
    assert returns.reserved_s(3.0 + LATE_S + 0.1) == 0.0
    assert returns.share < 0.8


def test_nothing_is_kept_for_callers_that_were_never_seen_to_come_back() -> None:
    returns = Returns()
    for k in range(100):
        assert returns.tell(k, 0.0, free_s=1.0, service_s=0.1) == 1
    assert returns.reserved_s(1.0) == 0.0


def test_the_work_of_a_refusal_does_not_grow_with_those_who_wait() -> None:
    """The measure of work is the number of comparisons of two requests."""
    compared = 0

    class Counted(_Return):
        def __lt__(self, other: _Return) -> bool:
            nonlocal compared
            compared += 1
            return super().__lt__(other)

    def work(waiting: int) -> int:
        nonlocal compared
        returns = obeyed()
        for k in range(waiting):
            returns.tell(k, 0.0, free_s=1.0, service_s=1e-6)
        returns.reserved_s(1.0)
        compared = 0
        for k in range(100):
            assert not returns.came_back(f"new {k}", 1.0)
            returns.reserved_s(1.0)
            returns.tell(f"new {k}", 1.0, free_s=1.0, service_s=1e-6)
        return compared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(returns_module, "_Return", Counted)
        few, many = work(50), work(5_000)
    assert many <= few + 100 * 8


@quick
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.floats(0.0, 3.0), st.floats(0.0, 500.0), st.floats(0.0, 10.0)),
        max_size=60,
    )
)
def test_whatever_comes_the_times_told_are_bounded(requests: list[tuple[int, float, float, float]]) -> None:
    returns, now = obeyed(), 0.0
    for key, gap_s, free_s, service_s in requests:
        now += gap_s
        if not returns.came_back(key, now):
            assert LEAST_S <= returns.tell(key, now, free_s=free_s, service_s=service_s) <= MOST_S
        assert 0.0 <= returns.share <= 1.0
        assert returns.reserved_s(now) >= 0.0
