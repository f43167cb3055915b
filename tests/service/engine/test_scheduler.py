"""The scheduler: which samples step next, and in how many rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.service.engine.fair_shares import Flow
from ditserve.service.engine.scheduler import SAFETY_MARGIN, Batch, Candidates, Scheduler

ALONE = Flow("", 1.0)


@dataclass(frozen=True)
class Waiter:
    name: str
    rows: int = 1
    deadline_at: float | None = None
    added_at: float = 0.0
    least_steps: int = 1
    steps: int = 1
    taken: int = 0
    flow: Flow = ALONE


def next_batch(
    scheduler: Scheduler,
    samples: Sequence[Waiter],
    saturation_rows: int,
    now: float,
    seconds: Callable[[int], float],
) -> Batch[Waiter]:
    return scheduler.next_batch([Candidates(samples, saturation_rows, seconds)], now=now)


def names(
    scheduler: Scheduler,
    samples: list[Waiter],
    saturation_rows: int = 99,
    now: float = 0.0,
    tick: float = 0.0,
) -> list[str]:
    batch = next_batch(scheduler, samples, saturation_rows, now, lambda rows: tick)
    return [sample.name for sample in batch.samples]


def test_the_earliest_deadline_goes_first_whatever_the_order_of_arrival() -> None:
    samples = [Waiter("c", deadline_at=30.0), Waiter("a", deadline_at=10.0), Waiter("b", deadline_at=20.0)]
    assert names(Scheduler(max_rows=2), samples) == ["a", "b"]


def test_equal_urgency_keeps_the_order_of_arrival() -> None:
    assert names(Scheduler(max_rows=8), [Waiter("a"), Waiter("b"), Waiter("c")]) == ["a", "b", "c"]


def test_without_a_deadline_one_waits_only_as_long_as_the_patience() -> None:
    scheduler = Scheduler(max_rows=1)
    old = Waiter("old", added_at=0.0)
    assert names(scheduler, [old, Waiter("urgent", deadline_at=59.0)]) == ["urgent"]
    assert names(scheduler, [old, Waiter("later", deadline_at=61.0)]) == ["old"]


def test_a_sample_without_laxity_goes_before_one_that_can_wait() -> None:
    scheduler = Scheduler(max_rows=1)
    long, short = Waiter("long", deadline_at=19.0, least_steps=10), Waiter("short", deadline_at=10.0)
    assert names(scheduler, [short, long], now=0.0, tick=1.0) == ["short"]
    assert names(scheduler, [short, long], now=7.0, tick=1.0) == ["long"]  # 10 steps of 1.1 s in 12 s
    free = Waiter("free", least_steps=1000)
    assert names(scheduler, [free, short], now=0.0, tick=1.0) == ["short"]


def stills_and_clips(still: Waiter, clip: Waiter) -> list[Candidates[Waiter]]:
    """Return candidates of two sizes: a pass of one still takes 0.1 s, and one of clips 8 s."""
    return [
        Candidates([still], 8, lambda rows: 0.1 * rows, size="stills"),
        Candidates([clip], 8, lambda rows: 8.0, row_cost=8.0, size="clips"),
    ]


def test_of_the_sizes_of_one_caller_the_earliest_deadline_goes_first_whatever_ran_before() -> None:
    scheduler = Scheduler(max_rows=8)
    sizes = stills_and_clips(Waiter("still", deadline_at=60.0), Waiter("clip", deadline_at=90.0))
    for _ in range(20):
        assert [sample.name for sample in scheduler.next_batch(sizes, now=0.0).samples] == ["still"]


@pytest.mark.parametrize(("due", "second"), [(8.5, "still"), (40.0, "clip")])
def test_a_sample_that_cannot_wait_for_a_pass_of_another_size_has_no_laxity(due: float, second: str) -> None:
    scheduler = Scheduler(max_rows=8)
    still = Waiter("still", deadline_at=due, least_steps=5, taken=1, steps=6, flow=Flow("a", 1.0))
    clip = Waiter("clip", taken=1, steps=6, flow=Flow("b", 1.0))
    # The caller of the still is ahead after its first pass.
    chosen = [scheduler.next_batch(stills_and_clips(still, clip), now=0.0).samples[0].name for _ in range(2)]
    assert chosen == ["still", second]


def test_no_sample_joins_that_makes_passes_too_long_for_one_without_laxity() -> None:
    scheduler = Scheduler(max_rows=8)
    others = [Waiter(str(k), deadline_at=1000.0) for k in range(8)]

    def with_a_tight_one(seconds: float) -> list[str]:
        tight = Waiter("tight", deadline_at=seconds, least_steps=10)
        batch = next_batch(scheduler, [*others, tight], 8, 0.0, float)
        return [sample.name for sample in batch.samples]

    assert with_a_tight_one(35.0) == ["tight", "0", "1"]  # ten passes of three rows, and a tenth more
    assert with_a_tight_one(11.0) == ["tight"]
    assert len(with_a_tight_one(89.0)) == 8, "there is time enough for full passes"
    assert len(with_a_tight_one(10.0)) == 8, "no sample waits for one that cannot meet its deadline"


def test_a_sample_without_laxity_caps_the_pass_as_in_the_worked_example() -> None:
    others = [Waiter(str(k), deadline_at=1000.0 + k) for k in range(8)]
    a = Waiter("A", deadline_at=2.6, least_steps=2)
    batch = next_batch(Scheduler(max_rows=8), [*others, a], 8, 0.0, lambda rows: 0.9 + 0.1 * rows)
    assert [sample.name for sample in batch.samples] == ["A", "0"]


def test_a_pass_is_as_long_as_the_size_it_is_padded_to() -> None:
    tight = Waiter("tight", deadline_at=35.0, least_steps=10)
    others = [Waiter(str(k), deadline_at=1000.0) for k in range(8)]
    batch = next_batch(Scheduler(max_rows=8, buckets=(2, 8)), [tight, *others], 8, 0.0, float)
    assert [sample.name for sample in batch.samples] == ["tight", "0"]


def test_all_that_there_is_room_for_step_together() -> None:
    samples = [Waiter("a"), Waiter("b", rows=2), Waiter("c", rows=3), Waiter("d", rows=2)]
    batch = next_batch(Scheduler(max_rows=8), samples, 8, 0.0, lambda rows: 0.0)
    assert batch.samples == tuple(samples)
    assert batch.stop_reason == "idle"


def test_a_row_left_over_goes_to_the_next_sample_it_fits() -> None:
    samples = [Waiter("a", rows=2), Waiter("b", rows=2), Waiter("c", rows=1)]
    batch = next_batch(Scheduler(max_rows=3), samples, 3, 0.0, lambda rows: 0.0)
    assert [sample.name for sample in batch.samples] == ["a", "c"]
    assert batch.stop_reason == "cap"


def test_saturation_caps_a_batch_and_max_rows_caps_saturation() -> None:
    samples = [Waiter(str(k)) for k in range(10)]
    assert len(names(Scheduler(max_rows=8), samples, saturation_rows=3)) == 3
    assert len(names(Scheduler(max_rows=8), samples, saturation_rows=99)) == 8


def test_a_batch_fills_the_bucket_it_is_padded_to() -> None:
    scheduler = Scheduler(max_rows=8, buckets=(1, 4, 8))
    assert len(names(scheduler, [Waiter(str(k)) for k in range(10)], saturation_rows=3)) == 4
    assert [scheduler.size(rows) for rows in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]


def test_strict_has_one_size() -> None:
    scheduler = Scheduler(max_rows=6, buckets=(1, 2, 4), strict=True)
    assert [scheduler.size(rows) for rows in (1, 3)] == [4, 4]
    assert len(names(scheduler, [Waiter(str(k)) for k in range(9)], saturation_rows=1)) == 4


def test_the_budget_is_of_tokens() -> None:
    scheduler = Scheduler(max_rows=8)
    assert [scheduler.cap(row_cost) for row_cost in (0.25, 1.0, 2.0, 3.0, 100.0)] == [8, 8, 4, 2, 1]
    fixed = Scheduler(max_rows=8, buckets=(2, 4, 8))
    assert [fixed.cap(row_cost) for row_cost in (1.0, 2.0, 3.0, 100.0)] == [8, 4, 2, 2]
    strict = Scheduler(max_rows=8, strict=True)
    assert strict.size(1, 2.0) == 4


def test_out_of_memory_at_large_rows_keeps_as_many_tokens_of_small_ones() -> None:
    scheduler = Scheduler(max_rows=16)
    assert scheduler.shrink(4, 4.0)
    assert [scheduler.cap(4.0), scheduler.cap(1.0)] == [2, 8]
    assert not scheduler.shrink(1, 8.0)


def test_one_sample_always_steps() -> None:
    assert names(Scheduler(max_rows=1), [Waiter("a", rows=2), Waiter("b")]) == ["a"]
    assert names(Scheduler(max_rows=1), []) == []


def test_out_of_memory_lowers_the_cap_until_nothing_is_smaller() -> None:
    free = Scheduler(max_rows=6)
    assert [free.shrink(rows) or rows for rows in (6, 3)] == [True, True]
    assert free.max_rows == 1
    assert not free.shrink(1)
    fixed = Scheduler(max_rows=8, buckets=(2, 4, 8))
    assert fixed.shrink(8)
    assert fixed.max_rows == 4
    assert fixed.shrink(4)
    assert fixed.size(1) == 2
    assert not fixed.shrink(2)


def test_sizes_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        Scheduler(max_rows=0)
    with pytest.raises(ValueError, match="no bucket"):
        Scheduler(max_rows=2, buckets=(4, 8))


_waiters = st.lists(
    st.builds(
        Waiter,
        name=st.uuids().map(str),
        rows=st.integers(1, 9),
        deadline_at=st.one_of(st.none(), st.floats(0, 100)),
        added_at=st.floats(0, 100),
        least_steps=st.integers(1, 50),
    ),
    max_size=20,
)


@given(
    samples=_waiters,
    max_rows=st.integers(2, 16),
    saturation_rows=st.integers(1, 16),
    strict=st.booleans(),
    tick=st.floats(0, 10),
)
def test_a_batch_fits_and_leaves_out_no_sample_that_would_fit(
    samples: list[Waiter], max_rows: int, saturation_rows: int, strict: bool, tick: float
) -> None:
    scheduler = Scheduler(max_rows=max_rows, strict=strict)
    batch = next_batch(scheduler, samples, saturation_rows, 50.0, lambda rows: tick)
    cap = max_rows if strict else min(saturation_rows, max_rows)
    left_out = [sample for sample in samples if sample not in batch.samples]
    rows = sum(sample.rows for sample in batch.samples)
    assert rows <= cap or len(batch.samples) == 1
    assert bool(batch.samples) == bool(samples)
    assert (batch.stop_reason == "cap") == bool(left_out)
    assert all(sample.rows > cap - rows for sample in left_out)


@given(
    samples=_waiters,
    saturation_rows=st.integers(1, 16),
    fixed_s=st.floats(0, 1),
    per_row_s=st.floats(0.01, 1),
)
def test_a_sample_that_joins_breaks_no_deadline_of_those_before_it(
    samples: list[Waiter], saturation_rows: int, fixed_s: float, per_row_s: float
) -> None:
    def pass_s(rows: int) -> float:
        return fixed_s + per_row_s * rows

    batch = next_batch(Scheduler(max_rows=16), samples, saturation_rows, 50.0, pass_s)
    rows = [sample.rows for sample in batch.samples]
    for count, sample in enumerate(batch.samples, start=1):
        if sample.deadline_at is not None:
            afforded = (sample.deadline_at - 50.0) / (SAFETY_MARGIN * sample.least_steps)
            assert pass_s(sum(rows[:count])) > afforded or pass_s(sum(rows)) <= afforded * (1 + 1e-9)
