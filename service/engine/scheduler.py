"""Which samples take their next step together, and in how many rows.

Earliest deadline first until zero laxity (EDZL, Cho et al. 2002) among the samples at hand: a sample takes its steps one after
the other, so one that must be in every batch from now on to be done in time goes before those that can wait, and nobody joins who
would make the passes too long for it. As many rows as the cost model finds worthwhile and the budget of tokens holds; padded to a
bucket where the backend runs fixed sizes. Pure: no clock, no network, no arrays; what it orders comes in as arguments. Never done
here: choosing who is claimed (the broker), at what quality (the planner), or which image size has its turn (`turns`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf
from typing import Generic, Literal, Protocol, TypeVar


class Waiting(Protocol):
    """A sample that could take a step. `least_steps` are those it needs yet, if it may be cut, after the deepest cut."""

    @property
    def deadline_at(self) -> float | None: ...
    @property
    def added_at(self) -> float: ...
    @property
    def rows(self) -> int: ...
    @property
    def least_steps(self) -> int: ...


S = TypeVar("S", bound=Waiting)

CARE = 1.1  # who has so many times the seconds that its steps need, and one step's more, can wait


@dataclass(frozen=True, slots=True)
class Batch(Generic[S]):
    """The samples that step together."""

    samples: tuple[S, ...]
    stop_reason: Literal["cap", "idle"]  # it grew no further: the cap was reached, or no sample was left


class Scheduler:
    """Forms batches.

    Args:
        max_rows: the most rows of one forward pass, and its budget of tokens, in rows of the bundle's own size. Lowered when
            the device runs out of memory.
        buckets: the batch sizes the backend runs, None for any.
        strict: run every pass at as many rows as it may have, so that results are equal to the last bit in any company. The
            price is the padding.
        patience_s: a sample without a deadline is ordered as if due this long after it joined, so that it never starves.
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
        self._buckets = (
            None if buckets is None else tuple(sorted(size for size in buckets if size <= max_rows))
        )
        if self._buckets == ():
            raise ValueError(f"no bucket of the backend fits in max_rows={max_rows}")
        self.max_rows = self._buckets[-1] if self._buckets else max_rows
        self._strict = strict
        self._patience_s = patience_s

    def next_batch(
        self,
        samples: Collection[S],
        knee: int,
        row_cost: float = 1.0,
        *,
        now: float,
        seconds: Callable[[int], float],
    ) -> Batch[S]:
        """The samples to step now, most urgent first, up to the worthwhile `knee` or the size that is run for it.

        All samples are of one size, at which a row has `row_cost` times the tokens of the bundle's own and a pass of so many rows
        takes `seconds`. At least one is chosen, even if its rows exceed the cap: rows need not share a forward pass.
        """
        room = self.size(min(knee, self.cap(row_cost)), row_cost)

        def pass_s(rows: int) -> float:
            return seconds(self.size(rows, row_cost))

        tick = pass_s(min(room, sum(sample.rows for sample in samples)))
        chosen: list[S] = []
        taken = 0
        for sample in sorted(samples, key=lambda sample: self._urgency(sample, now, tick)):
            if taken + sample.rows > room and chosen:
                continue  # a later sample of fewer rows may still fit
            chosen.append(sample)
            taken += sample.rows
            step_s = _step_s(sample, now)
            if step_s < tick:
                afforded = bisect_right(range(1, room + 1), step_s, key=pass_s)
                room = max(taken, afforded) if afforded >= sample.rows else room  # else it is lost
        return Batch(tuple(chosen), "cap" if len(chosen) < len(samples) else "idle")

    def cap(self, row_cost: float = 1.0) -> int:
        """The most rows of one forward pass: what the budget holds, at most `max_rows`, at least the smallest size there is."""
        rows = max(1, min(self.max_rows, int(self.max_rows / row_cost)))
        if self._buckets is None:
            return rows
        return max((size for size in self._buckets if size <= rows), default=self._buckets[0])

    def size(self, rows: int, row_cost: float = 1.0) -> int:
        """Rows that are run for `rows` wanted ones, 1..`cap`: the smallest size that holds them."""
        if self._strict:
            return self.cap(row_cost)
        return next(size for size in self._buckets if size >= rows) if self._buckets else rows

    def shrink(self, rows: int, row_cost: float = 1.0) -> bool:
        """Out of memory at `rows` rows: never run that many tokens again. False when nothing smaller is possible."""
        smaller = [size for size in self._buckets if size < rows] if self._buckets else [rows // 2]
        if not smaller or smaller[-1] < 1:
            return False
        self.max_rows = min(self.max_rows, max(smaller[-1], int(smaller[-1] * row_cost)))
        return True

    def _urgency(self, sample: S, now: float, tick: float) -> tuple[int, float]:
        """Less goes first."""
        deadline = sample.deadline_at
        if deadline is None:
            return 1, sample.added_at + self._patience_s
        return int(deadline - now > (CARE * sample.least_steps + 1) * tick), deadline


def _step_s(sample: Waiting, now: float) -> float:
    """The seconds that each of a sample's steps may take if it is in every batch from now on."""
    deadline = sample.deadline_at
    return inf if deadline is None else (deadline - now) / (CARE * sample.least_steps)
