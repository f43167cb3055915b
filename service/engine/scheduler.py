"""Which samples take their next step together, and in how many rows.

Earliest deadline first among the samples at hand; as many rows as the cost model finds worthwhile; padded to a bucket
where the backend runs fixed sizes. Pure: no clock, no network, no arrays; what it orders comes in as arguments. Never
done here: choosing who is claimed (the broker) or at what quality (the planner).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar


class Waiting(Protocol):
    """A sample that could take a step."""

    @property
    def deadline_at(self) -> float | None: ...
    @property
    def added_at(self) -> float: ...
    @property
    def rows(self) -> int: ...


S = TypeVar("S", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Batch(Generic[S]):
    """Row i is sample i; the row after them for each of `guided`, in order, is that sample's unconditional one."""

    samples: tuple[S, ...]
    guided: tuple[int, ...]
    stop_reason: Literal["cap", "idle"]  # it grew no further: the cap was reached, or no sample was left

    @property
    def rows(self) -> int:
        return len(self.samples) + len(self.guided)


class Scheduler:
    """Forms batches.

    Args:
        max_rows: the most rows of one forward pass. Lowered when the device runs out of memory.
        buckets: the batch sizes the backend runs, None for any.
        strict: run every pass at exactly `max_rows` rows, so that results are equal to the last bit in any company. The
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

    def next_batch(self, samples: Sequence[S], knee: int) -> Batch[S]:
        """The samples to step now, most urgent first, up to the worthwhile `knee` or the size that is run for it.

        At least one sample is chosen, even if its two rows exceed the cap: rows need not share a forward pass.
        """
        room = self.size(min(knee, self.max_rows))
        chosen: list[S] = []
        guided: list[int] = []
        for sample in sorted(samples, key=self._due):
            rows = sample.rows
            if rows > room and chosen:
                continue  # a later sample of one row may still fit
            if rows == 2:
                guided.append(len(chosen))
            chosen.append(sample)
            room -= rows
        return Batch(tuple(chosen), tuple(guided), "cap" if len(chosen) < len(samples) else "idle")

    def size(self, rows: int) -> int:
        """Rows that are run for `rows` wanted ones, 1..`max_rows`: the smallest size that holds them."""
        if self._strict:
            return self.max_rows
        return next(size for size in self._buckets if size >= rows) if self._buckets else rows

    def shrink(self, rows: int) -> bool:
        """Out of memory at `rows` rows: never run that many again. False when nothing smaller is possible."""
        smaller = [size for size in self._buckets if size < rows] if self._buckets else [rows // 2]
        if not smaller or smaller[-1] < 1:
            return False
        self.max_rows = smaller[-1]
        return True

    def _due(self, sample: S) -> float:
        deadline = sample.deadline_at
        return sample.added_at + self._patience_s if deadline is None else deadline
