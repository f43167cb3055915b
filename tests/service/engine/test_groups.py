"""Turns of groups: the share of each is in proportion to what it has waiting, and none starves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from itertools import pairwise
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.service.engine.groups import MAX_VISITS, DeficitRoundRobin, GroupDemand

G = TypeVar("G", bound=Hashable)

quick = settings(max_examples=25, deadline=None)
demands = st.dictionaries(
    st.integers(0, 9),
    st.tuples(st.floats(1.0, 64.0), st.floats(1.0, 40.0)).map(
        lambda pair: GroupDemand(pair[0], pair[0] * pair[1])
    ),
    min_size=1,
    max_size=6,
)


def run(turns: DeficitRoundRobin[G], waiting: dict[G, GroupDemand], count: int) -> list[G]:
    return [turns.next(waiting) for _ in range(count)]


@quick
@given(demands)
def test_work_is_shared_in_proportion_to_what_waits(waiting: dict[int, GroupDemand]) -> None:
    """Up to one batch of each group, over any length of time, except that the smallest get more."""
    turns: DeficitRoundRobin[int] = DeficitRoundRobin()
    served = Counter[int]()
    largest = max(waiting, key=lambda group: waiting[group].waiting)
    for group in run(turns, waiting, 500):
        served[group] += 1
    rounds = served[largest]
    for group, demand in waiting.items():
        rate = waiting[largest].batch / waiting[largest].waiting
        quantum = max(rate * demand.waiting, demand.batch / MAX_VISITS)
        assert served[group] * demand.batch == pytest.approx(
            rounds * quantum, abs=2 * (demand.batch + quantum)
        )


@quick
@given(demands)
def test_no_group_starves(waiting: dict[int, GroupDemand]) -> None:
    """Between two turns of a group the circle is visited at most `MAX_VISITS` times and a bit."""
    order = run(DeficitRoundRobin(), waiting, 400)
    largest = max(waiting.values(), key=lambda demand: demand.waiting)
    round_ = sum(
        1 + demand.waiting * largest.batch / largest.waiting / demand.batch for demand in waiting.values()
    )
    for group in waiting:
        turns = [-1, *(k for k, served in enumerate(order) if served == group), len(order)]
        assert max(b - a for a, b in pairwise(turns)) <= (MAX_VISITS + 1) * round_ + len(waiting)


@quick
@given(st.integers(1, 40))
def test_equal_groups_alternate(batch: int) -> None:
    turns: DeficitRoundRobin[str] = DeficitRoundRobin()
    waiting = {name: GroupDemand(batch, 3 * batch) for name in "abc"}
    assert Counter(turns.next(waiting) for _ in range(30)) == dict.fromkeys("abc", 10)


def test_turns_are_as_in_the_worked_example() -> None:
    turns: DeficitRoundRobin[str] = DeficitRoundRobin()
    waiting = {"A": GroupDemand(8.0, 80.0), "B": GroupDemand(2.0, 5.0)}
    assert Counter(run(turns, waiting, 50)) == {"A": 40, "B": 10}


def test_a_group_alone_runs_every_time_and_saves_nothing_up() -> None:
    turns: DeficitRoundRobin[str] = DeficitRoundRobin()
    assert [turns.next({"a": GroupDemand(4.0, 9.0)}) for _ in range(5)] == ["a"] * 5
    both = {"a": GroupDemand(4.0, 8.0), "b": GroupDemand(4.0, 8.0)}
    assert Counter(turns.next(both) for _ in range(8)) == {"a": 4, "b": 4}


def test_a_tiny_group_waits_no_longer_than_the_patience() -> None:
    turns: DeficitRoundRobin[str] = DeficitRoundRobin()
    crowd = {"crowd": GroupDemand(8.0, 8000.0), "one": GroupDemand(1.0, 1.0)}
    order = [turns.next(crowd) for _ in range(200)]
    gaps = [k for k, group in enumerate(order) if group == "one"]
    assert len(gaps) >= 200 // (MAX_VISITS + 2)
    assert max(b - a for a, b in pairwise(gaps)) <= MAX_VISITS + 1
