"""The scheduler: which samples take their next step together, and in how many rows.

Earliest deadline first until zero laxity (EDZL, Cho et al. 2002) among the running samples. A sample takes
its steps one after the other. One that must be in every batch from now on to be done in time, one without
laxity, goes before those that can wait, and no sample joins that would make the passes too long for it. A
batch has as many rows as the cost model finds worthwhile and the budget of tokens holds; it is padded to a
bucket where the backend runs fixed sizes.

Pure: no clock, no network, no arrays; what it orders comes in as arguments. It does not decide which jobs are
claimed (the broker), at what quality they run (the planner), or which image size has its turn (`groups`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf
from typing import Generic, Literal, Protocol, TypeVar

# The time that the steps of a sample need is taken to be so many times as long as predicted.
SAFETY_MARGIN = 1.1


class Schedulable(Protocol):
    """A sample that could take a step.

    `least_steps` are the steps it still needs, after the deepest cut that its request consents to.
    """

    @property
    def deadline_at(self) -> float | None: ...
    @property
    def added_at(self) -> float: ...
    @property
    def rows(self) -> int: ...
    @property
    def least_steps(self) -> int: ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Batch(Generic[S]):
    """The samples that step together.

    `stop_reason` says why there are no more: the cap was reached, or no sample was left (idle).
    """

    samples: tuple[S, ...]
    stop_reason: Literal["cap", "idle"]


class Scheduler:
    """The scheduler of one engine, which forms batches.

    Args:
        max_rows: the most rows of one forward pass, and its budget of tokens, in rows of the bundle's own
            size. Lowered when the device runs out of memory.
        buckets: the batch sizes the backend runs, None for any.
        strict: run every pass at as many rows as it may have, so that results are equal to the last bit in
            any batch. The price is the padding.
        patience_s: a sample without a deadline is ordered as if due this long after it joined, so that it
            never starves.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        buckets: Iterable[int] | None = None,
        strict: bool = False,
        patience_s: float = 60.0,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        fitting = None if buckets is None else tuple(sorted(size for size in buckets if size <= max_rows))
        if fitting == ():
            raise ValueError(f"no bucket of the backend fits in max_rows={max_rows}")
        self._buckets = fitting
        self.max_rows = fitting[-1] if fitting else max_rows
        self._strict = strict
        self._patience_s = patience_s

    def next_batch(
        self,
        samples: Collection[S],
        saturation_rows: int,
        row_cost: float = 1.0,
        *,
        now: float,
        seconds: Callable[[int], float],
    ) -> Batch[S]:
        """Return the samples to step now, most urgent first.

        They have up to `saturation_rows` rows, or up to the size that is run for so many.

        All samples are of one image size: a row has `row_cost` times the tokens of the bundle's own size, and
        a pass of r rows takes `seconds(r)`. At least one sample is chosen, even if its rows exceed the cap:
        rows need not share a pass.

        Example: a pass of r rows takes 0.9 + 0.1·r s, and 8 rows are worthwhile. Among nine samples of one
        row each, A has 2 steps left and is due in 2.6 s. With the safety margin of 1.1 its passes may take
        2.6 / (1.1 · 2) = 1.18 s each. A full pass of 8 takes 1.7 s, so A has no laxity: it goes first and
        caps this pass at 2 rows (1.1 s), because 3 take 1.2 s. The most urgent one of the others joins it.
        """

        def pass_s(rows: int) -> float:
            return seconds(self.size(rows, row_cost))

        def largest_batch_within(limit_s: float, rows: int) -> int:
            return bisect_right(range(1, rows + 1), limit_s, key=pass_s)

        room = self.size(min(saturation_rows, self.cap(row_cost)), row_cost)
        full_pass_s = pass_s(min(room, sum(sample.rows for sample in samples)))
        chosen: list[S] = []
        taken = 0
        for sample in sorted(samples, key=lambda sample: self._urgency(sample, now, full_pass_s)):
            if taken + sample.rows > room and chosen:
                continue  # a later sample of fewer rows may still fit
            chosen.append(sample)
            taken += sample.rows
            limit_s = _longest_pass_s(sample, now)
            if limit_s < full_pass_s:
                # A sample without laxity caps how long this pass may take. If it cannot meet its deadline
                # even alone, no other sample waits for it.
                largest = largest_batch_within(limit_s, room)
                if largest >= sample.rows:
                    room = max(taken, largest)
        return Batch(tuple(chosen), "cap" if len(chosen) < len(samples) else "idle")

    def cap(self, row_cost: float = 1.0) -> int:
        """Return the most rows of a pass: as the budget allows, and at least the smallest size there is."""
        rows = max(1, min(self.max_rows, int(self.max_rows / row_cost)))
        if self._buckets is None:
            return rows
        return max((size for size in self._buckets if size <= rows), default=self._buckets[0])

    def size(self, rows: int, row_cost: float = 1.0) -> int:
        """Return the rows that are run for `rows` wanted ones, 1..`cap`: the smallest size that is enough."""
        if self._strict:
            return self.cap(row_cost)
        return next(size for size in self._buckets if size >= rows) if self._buckets else rows

    def shrink(self, rows: int, row_cost: float = 1.0) -> bool:
        """Lower the budget after `rows` rows did not fit in memory; return False if nothing is smaller."""
        smaller = [size for size in self._buckets if size < rows] if self._buckets else [rows // 2]
        if not smaller or smaller[-1] < 1:
            return False
        self.max_rows = min(self.max_rows, max(smaller[-1], int(smaller[-1] * row_cost)))
        return True

    def _urgency(self, sample: S, now: float, full_pass_s: float) -> tuple[int, float]:
        """Return the sort key of a sample: those without laxity first, then all others, by deadline.

        A sample has laxity if it could still be done in time after it waited one full pass.
        """
        deadline = sample.deadline_at
        if deadline is None:
            return 1, sample.added_at + self._patience_s
        can_wait = deadline - now > (SAFETY_MARGIN * sample.least_steps + 1) * full_pass_s
        return int(can_wait), deadline


def _longest_pass_s(sample: Schedulable, now: float) -> float:
    """Return how long each pass may take if the sample is in every one; infinite without a deadline."""
    deadline = sample.deadline_at
    return inf if deadline is None else (deadline - now) / (SAFETY_MARGIN * sample.least_steps)
