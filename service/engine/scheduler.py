"""The scheduler: which samples take their next step together, and in how many rows.

Callers share the machine by their weights (`fair_shares`); only rows of one size share a pass. Among the
samples of one caller, of any size, the earliest deadline goes first until zero laxity (EDZL, Cho et al.
2002). A sample takes its steps one after the other. One that must be in every batch from now on to be done in
time, one without laxity, goes before those that can wait, as far as its caller's lead allows. No sample joins
that would make the passes too long for it, or for a caller of few rows, whose share of the machine is one of
its time. A batch has as many rows as the cost model finds worthwhile and the budget of tokens holds; it is
padded to a bucket where the backend runs fixed sizes.

Pure: no clock, no network, no arrays; what it orders comes in as arguments. It does not decide which jobs are
claimed (the broker), or at what quality they run (the planner).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Generic, Literal, Protocol, TypeVar

from ditserve.service.engine.fair_shares import FairShares, Flow, Shared, Turn, TurnsByFlow

# The time that the steps of a sample need is taken to be so many times as long as predicted.
SAFETY_MARGIN: Final = 1.1
# A sample without a deadline is ordered as if due so long after it joined, and so many times its own length
# later. The short ones of a caller therefore go before his long ones, and none starves.
PATIENCE_S: Final = 60.0
PATIENCE_LENGTHS: Final = 10.0


class Schedulable(Shared, Protocol):
    """A sample that could take a step.

    `least_steps` are the steps it still needs, after the deepest cut that its request consents to.
    """

    @property
    def deadline_at(self) -> float | None: ...
    @property
    def added_at(self) -> float: ...
    @property
    def least_steps(self) -> int: ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Candidates(Generic[S]):
    """The samples whose rows can share a pass, and what their passes cost.

    `size` is what these rows have in common: their size, and their backbone where there are several.
    `saturation_rows` are worthwhile in one pass. A row is `row_cost` times the work of one of the bundle's
    own size and backbone, and a pass of r rows takes `seconds(r)`.
    """

    samples: Collection[S]
    saturation_rows: int
    seconds: Callable[[int], float]
    row_cost: float = 1.0
    size: Hashable = None


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
    """

    def __init__(self, *, max_rows: int, buckets: Iterable[int] | None = None, strict: bool = False) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        fitting = None if buckets is None else tuple(sorted(size for size in buckets if size <= max_rows))
        if fitting == ():
            raise ValueError(f"no bucket of the backend fits in max_rows={max_rows}")
        self._buckets = fitting
        self.max_rows = fitting[-1] if fitting else max_rows
        self._strict = strict
        self._shares = FairShares()

    def next_batch(self, candidates: Sequence[Candidates[S]], *, now: float) -> Batch[S]:
        """Return the samples to step now, and charge them to their callers.

        They are of one size and have up to its `saturation_rows` rows, or up to the size that is run for so
        many. At least one sample is chosen, even if its rows exceed the cap: rows need not share a pass.

        Example: a pass of r rows takes 0.9 + 0.1·r s, and 8 rows are worthwhile. Among nine samples of one
        row each, A has 2 steps left and is due in 2.6 s. With the safety margin of 1.1 its passes may take
        2.6 / (1.1 · 2) = 1.18 s each. A full pass of 8 takes 1.7 s, so A has no laxity: it goes first and
        caps this pass at 2 rows (1.1 s), because 3 take 1.2 s. The most urgent one of the others joins it.
        """
        flows: dict[Flow, list[Turn[S]]] = {}
        passes_s = [self._full_pass_s(group) for group in candidates]
        for group, full_pass_s in zip(candidates, passes_s, strict=True):
            for turn in self._turns(group, now, full_pass_s, max(passes_s)):
                flows.setdefault(turn.sample.flow, []).append(turn)
        if not flows:
            return Batch((), "idle")
        first = self._shares.first(flows)
        size = candidates[0].size if len(candidates) == 1 else self._shares.next_size(flows, first)
        group = next(group for group in candidates if group.size == size)
        limits_s = self._fair_limits(group, flows)
        chosen = self._fill(group, self._shares.order(flows, first, size), first, limits_s, now)
        rows = sum(turn.sample.rows for turn in chosen)
        seconds = self._seconds(group, rows)
        slowed = {flow for flow, limit_s in limits_s.items() if seconds > limit_s}
        self._shares.charge(flows, chosen, self._cost(group, rows), slowed)
        return Batch(
            tuple(turn.sample for turn in chosen), "cap" if len(chosen) < len(group.samples) else "idle"
        )

    def _fill(
        self,
        group: Candidates[S],
        order: Iterator[Turn[S]],
        first: Collection[Flow],
        limits_s: Mapping[Flow, float],
        now: float,
    ) -> list[Turn[S]]:
        """Return the turns, in their order, that fit into the next pass.

        A sample without laxity caps how long this pass may take, and so does a flow of few rows.
        """
        room, full_pass_s = self._room(group), self._full_pass_s(group)
        chosen: list[Turn[S]] = []
        taken = 0
        for turn in order:
            sample = turn.sample
            if taken + sample.rows > room and chosen:
                continue  # a later sample of fewer rows may still fit
            chosen.append(turn)
            taken += sample.rows
            limit_s = limits_s.get(sample.flow, inf)
            if sample.deadline_at is not None and turn.urgent and sample.flow in first:
                in_time_s = (sample.deadline_at - now) / (SAFETY_MARGIN * sample.least_steps)
                # If it cannot meet its deadline even alone, no other sample waits for it.
                if self._seconds(group, sample.rows) <= in_time_s:
                    limit_s = min(limit_s, in_time_s)
            if limit_s < full_pass_s:
                rows = range(1, room + 1)
                room = max(taken, bisect_right(rows, limit_s, key=lambda rows: self._seconds(group, rows)))
        return chosen

    def _fair_limits(self, group: Candidates[S], flows: TurnsByFlow[S]) -> dict[Flow, float]:
        """Return the seconds that a pass may take if a flow is in it, for flows that lose by waiting.

        A flow of few rows has them in every pass, but a share of the machine is a share of its time. All its
        rows may take the time of a pass of their own, divided by its share.

        Example: passes of 2, 10 and 64 rows take 3.4, 6.6 and 28 ms. A caller with 2 rows beside a flood has
        half of the machine, so its passes may take 6.8 ms. It takes 8 rows of the flood with it, not 62: it
        is done in twice its time alone, and the flood has 1.2 rows a ms, half of the 2.3 that it has alone.
        """
        present = {
            flow: turns
            for flow, all_turns in flows.items()
            if (turns := [turn for turn in all_turns if turn.size == group.size])
        }
        weight = sum(flow.weight for flow in present)
        return {
            flow: weight / flow.weight * self._seconds(group, sum(turn.sample.rows for turn in turns))
            for flow, turns in present.items()
            if any(turn.waits for turn in turns)
        }

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

    def _room(self, group: Candidates[S]) -> int:
        """Return the most rows of the next pass."""
        return self.size(min(group.saturation_rows, self.cap(group.row_cost)), group.row_cost)

    def _full_rows(self, group: Candidates[S]) -> int:
        """Return the rows of a pass that takes in all samples, as far as they fit."""
        return min(self._room(group), sum(sample.rows for sample in group.samples))

    def _seconds(self, group: Candidates[S], rows: int) -> float:
        """Return the seconds that `rows` rows take, in several passes if they exceed the cap."""
        cap = self.cap(group.row_cost)
        if rows > cap:
            return group.seconds(cap) * rows / cap
        return group.seconds(self.size(rows, group.row_cost))

    def _cost(self, group: Candidates[S], rows: int) -> float:
        """Return the cost of a pass: the time it takes, in rows of the bundle's own size in full passes."""
        room = self._room(group)
        full_pass_s = self._seconds(group, room)
        full_passes = self._seconds(group, rows) / full_pass_s if full_pass_s else rows / room
        return group.row_cost * room * full_passes

    def _full_pass_s(self, group: Candidates[S]) -> float:
        """Return the seconds of a pass that takes in all samples, as far as they fit."""
        return self._seconds(group, self._full_rows(group))

    def _turns(
        self, group: Candidates[S], now: float, full_pass_s: float, longest_s: float
    ) -> Iterator[Turn[S]]:
        """Yield the turns of a group.

        A sample has laxity if it could still be done in time after it waited for the longest full pass of any
        size.
        """
        full_cost = self._full_rows(group) * group.row_cost
        for sample in group.samples:
            due, urgent = sample.deadline_at, False
            if due is None:
                due = sample.added_at + PATIENCE_S + PATIENCE_LENGTHS * sample.steps * full_pass_s
            else:
                urgent = due - now <= SAFETY_MARGIN * sample.least_steps * full_pass_s + longest_s
            yield Turn(
                sample,
                group.size,
                due,
                urgent=urgent,
                waits=urgent or sample.deadline_at is None,
                cost=sample.rows * group.row_cost,
                full_cost=full_cost,
            )
