"""Turns of groups that cannot run together: everybody's share is what they have waiting, and nobody starves."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.service.engine.turns import PATIENCE, Demand, Turns

quick = settings(max_examples=25, deadline=None)
demands = st.dictionaries(
    st.integers(0, 9),
    st.tuples(st.floats(1.0, 64.0), st.floats(1.0, 40.0)).map(
        lambda pair: Demand(pair[0], pair[0] * pair[1])
    ),
    min_size=1,
    max_size=6,
)


def run(turns: Turns[int], waiting: dict[int, Demand], count: int) -> list[int]:
    return [turns.next(waiting) for _ in range(count)]


@quick
@given(demands)
def test_work_is_shared_in_proportion_to_what_waits(waiting: dict[int, Demand]) -> None:
    """Up to one batch of each group, over any length of time, except that the smallest get more."""
    turns: Turns[int] = Turns()
    served = Counter[int]()
    largest = max(waiting, key=lambda group: waiting[group].waiting)
    for group in run(turns, waiting, 500):
        served[group] += 1
    rounds = served[largest]
    for group, demand in waiting.items():
        rate = waiting[largest].batch / waiting[largest].waiting
        quantum = max(rate * demand.waiting, demand.batch / PATIENCE)
        assert served[group] * demand.batch == pytest.approx(
            rounds * quantum, abs=2 * (demand.batch + quantum)
        )


@quick
@given(demands)
def test_nobody_starves(waiting: dict[int, Demand]) -> None:
    """Between two turns of a group the ring is visited at most `PATIENCE` times and a bit, each group for what it is owed."""
    order = run(Turns(), waiting, 400)
    largest = max(waiting.values(), key=lambda demand: demand.waiting)
    round_ = sum(1 + each.waiting * largest.batch / largest.waiting / each.batch for each in waiting.values())
    for group in waiting:
        turns = [-1, *(k for k, served in enumerate(order) if served == group), len(order)]
        assert max(b - a for a, b in pairwise(turns)) <= (PATIENCE + 1) * round_ + len(waiting)


@quick
@given(st.integers(1, 40))
def test_equal_groups_alternate(batch: int) -> None:
    turns: Turns[str] = Turns()
    waiting = {name: Demand(batch, 3 * batch) for name in "abc"}
    assert Counter(turns.next(waiting) for _ in range(30)) == dict.fromkeys("abc", 10)


def test_a_group_alone_runs_every_time_and_saves_nothing_up() -> None:
    turns: Turns[str] = Turns()
    assert [turns.next({"a": Demand(4.0, 9.0)}) for _ in range(5)] == ["a"] * 5
    both = {"a": Demand(4.0, 8.0), "b": Demand(4.0, 8.0)}
    assert Counter(turns.next(both) for _ in range(8)) == {"a": 4, "b": 4}


def test_a_tiny_group_waits_no_longer_than_the_patience() -> None:
    turns: Turns[str] = Turns()
    crowd = {"crowd": Demand(8.0, 8000.0), "one": Demand(1.0, 1.0)}
    order = [turns.next(crowd) for _ in range(200)]
    gaps = [k for k, group in enumerate(order) if group == "one"]
    assert len(gaps) >= 200 // (PATIENCE + 2)
    assert max(b - a for a, b in pairwise(gaps)) <= PATIENCE + 1
