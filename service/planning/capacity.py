"""Capacity: what a fleet can do by when, from the state its workers publish.

A worker is a cost model and a backlog of rows by deadline. Work that no worker has claimed yet flows to
whichever is free first. Pure: arithmetic on a load snapshot.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from math import ceil, inf

from ditserve.service.fleet import LoadSnapshot, WorkerState
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.demand import demand_of

REPORTED_S = 0.5  # seconds within which a worker that is well reports again

_ROUNDING = 1e-9  # a batch that fits but for the rounding of floats fits


@dataclass(frozen=True, slots=True)
class _Speed:
    """A worker at the batch that it runs: the line of its passes, the rows of that batch, rows a second."""

    fixed_s: float
    per_row_s: float
    batch: int
    rows_per_s: float

    @classmethod
    def at(cls, fixed_s: float, per_row_s: float, batch: int) -> _Speed:
        return cls(fixed_s, per_row_s, batch, batch / (fixed_s + per_row_s * batch))

    def predict(self, rows: int) -> float:
        """Return the seconds of a pass of `rows` rows."""
        return self.fixed_s + self.per_row_s * rows

    def within(self, pass_s: float) -> _Speed:
        """Return it at the largest batch whose passes take up to `pass_s`, and at no larger one than now."""
        if self.predict(self.batch) <= pass_s:
            return self
        batch = int((pass_s - self.fixed_s) / self.per_row_s * (1.0 + _ROUNDING))
        return _Speed.at(self.fixed_s, self.per_row_s, max(1, batch))


@lru_cache(1024)
def _speed(fixed_s: float, per_row_s: float, max_rows: int, batch_rows: int) -> _Speed:
    """Return the speed of a worker at the batch that it says it runs, or else at the best by its costs."""
    fixed_s, per_row_s = max(0.0, fixed_s), max(1e-9, per_row_s)
    best = CostModel(fixed_s=fixed_s, per_row_s=per_row_s).saturation_rows
    return _Speed.at(fixed_s, per_row_s, batch_rows or best(max(1, max_rows)))


def _speed_of(worker: WorkerState, slowness: float = 1.0) -> _Speed:
    """Return the speed of a worker whose steps take `slowness` times as long as it reports."""
    fixed_s, per_row_s = worker.step_fixed_s * slowness, worker.step_per_row_s * slowness
    return _speed(fixed_s, per_row_s, worker.max_rows, worker.batch_rows)


def _stalled_s(speed: _Speed, silent_s: float) -> float:
    """Return the seconds for which a worker is taken to go on standing still, silent for `silent_s`.

    Stalls are heavy-tailed: one lasts, on average, as long again as it has lasted. A worker stalls once its
    step takes longer than predicted, or its report is late.

    Example: a step of the best batch takes 0.2 s, and reports come every 0.5 s. The last report is 0.6 s old
    and says that the last step had ended 0.9 s before. The worker is late by 0.6 + 0.9 - 0.2 - 0.5 = 0.8 s,
    and is taken to go on in 0.8 s.
    """
    return max(0.0, silent_s - speed.predict(speed.batch) - REPORTED_S)


def _slowness(worker: WorkerState, within_s: float) -> float:
    """Return how many times as long as reported the steps of a worker may take over `within_s` seconds."""
    told = [spell.factor for spell in worker.slow if spell.over_s <= within_s]
    return told[-1] if told else max((spell.factor for spell in worker.slow), default=1.0)


class _Backlog:
    """Rows by deadline, added up."""

    def __init__(self, demand: Iterable[tuple[float, int]]) -> None:
        ordered = sorted(demand)
        self.deadlines = [at for at, _ in ordered]
        self.rows_until = list(accumulate((rows for _, rows in ordered), initial=0))

    def due_by(self, at: float) -> int:
        """Return the rows that are due at or before a time."""
        return self.rows_until[bisect_right(self.deadlines, at)]


class _Demand:
    """The claimed work of each worker and of all together, and the rows of the queue; see `Capacity`."""

    def __init__(self, load: LoadSnapshot, *, recut: bool) -> None:
        demands = [demand_of(worker) for worker in load.workers]
        counted = [
            [(bucket.at, bucket.floor_rows if recut else bucket.rows) for bucket in demand]
            for demand in demands
        ]
        self.backlogs = list(map(_Backlog, counted))
        self.whole = _Backlog(chain.from_iterable(counted))
        claimed, floors = sum(bucket.rows for demand in demands for bucket in demand), self.whole.rows_until
        # The queue has no floors of its own: it is taken to be as willing to be cut as the claimed work.
        self.queued_rows = load.queued_rows * (floors[-1] / claimed if claimed else 1.0)


class Capacity:
    """A load snapshot made ready for several questions.

    With `recut` accepted work counts at the lowest rung it consents to, because it may still be cut. Where it
    must hold for `within_s` seconds, workers are as slow as they may be over such a time; without it they are
    as they are now.
    """

    def __init__(self, load: LoadSnapshot, *, recut: bool = False, within_s: float | None = None) -> None:
        self._workers = load.workers
        self._speeds = [
            _speed_of(worker, 1.0 if within_s is None else _slowness(worker, within_s))
            for worker in load.workers
        ]
        self._silent = [load.taken_at - worker.updated_at + worker.last_step_age_s for worker in load.workers]
        self._stalls = list(map(_stalled_s, self._speeds, self._silent))
        self._load, self._recut = load, recut

    @cached_property
    def _demand(self) -> _Demand:
        # Not every question is about it, and it takes as long as the answer to one that is.
        return _Demand(self._load, recut=self._recut)

    def in_passes_of(self, pass_s: float) -> Capacity:
        """Return the capacity in passes of up to `pass_s` seconds.

        An engine full of work without laxity runs no longer ones, whatever batch is its best.

        Example: passes take 20 ms and 5 ms a row, and the best batch of 64 rows takes 340 ms: 188 rows a
        second. 50 steps that are due in 4 s leave 80 ms a pass. That is enough for 12 rows, so the worker
        counts for 150 rows a second.
        """
        speeds = [speed.within(pass_s) for speed in self._speeds]
        if speeds == self._speeds:
            return self
        # `copy.copy` takes three times as long.
        capped = Capacity.__new__(Capacity)
        vars(capped).update(vars(self), _demand=self._demand)
        capped._speeds = speeds
        capped._stalls = list(map(_stalled_s, capped._speeds, self._silent))
        return capped

    def queue_drain_time(self, extra_rows: int = 0, *, due: float = inf) -> float:
        """Return the seconds until the queue, `extra_rows` behind it, and backlogs due by `due` are done.

        The queue is water filling: workers join as their backlog ends, and all that have joined share the
        queue by their speeds. Infinite without workers.

        Example: 150 rows are queued. A has a backlog of 10 s, B of 20 s, and each does 5 rows a second. From
        10 s to 20 s A alone does 50 rows. From then on both do the other 100, 10 rows a second: the queue is
        done after 30 s.
        """
        waiting = self._demand.queued_rows + extra_rows
        rate, joined_at = 0.0, 0.0  # of the workers that have joined, and when the last of them did
        for backlog_s, rows_per_s in sorted(self._times(due)):
            absorbed = rate * (backlog_s - joined_at)
            if rate and absorbed >= waiting:
                break
            waiting -= absorbed
            joined_at = backlog_s
            rate += rows_per_s
        return joined_at + waiting / rate if rate else inf

    def drain_time(self, extra_rows: int = 0) -> float:
        """Return the seconds until everything claimed, the queue and `extra_rows` are done."""
        backlogs = [backlog_s for backlog_s, _ in self._times(inf)]
        return max([self.queue_drain_time(extra_rows), *backlogs])

    def fleet_time(self, rows: int) -> float:
        """Return the seconds that `rows` take all workers together. There must be one."""
        return rows / self._rows_per_s

    def breaks_later_deadline(self, extra_rows: int, due: float, *, now: float, margin: float) -> bool:
        """Return whether `extra_rows` due at `due` would break a later deadline of claimed work.

        A deadline that does not hold without them is not counted.

        Example: the fleet does 10 rows a second, the margin is 1, and 80 claimed rows are due in 10 s. 30
        more rows due in 5 s would make 110 rows due in the 10 s in which 100 can be done: true. If 120 rows
        were due in 10 s anyway, that deadline could not hold without them either: false.
        """
        whole, rows_per_s = self._demand.whole, self._rows_per_s
        for k in range(bisect_right(whole.deadlines, due), len(whole.deadlines)):
            at, demand = whole.deadlines[k], whole.rows_until[k + 1]
            room = (at - now) / margin * rows_per_s
            if at < inf and demand <= room < demand + extra_rows:
                return True
        return False

    def time_in_every_batch(self, *, rows: int, steps: int, samples: int, idle: bool = False) -> float:
        """Return the seconds of `samples` samples of `steps` steps, `rows` rows in all, decoding included.

        The samples are in every batch from now on, on the worker that is done soonest. Its batches also have
        a row of each sample that runs there, or with `idle` no other rows. Infinite without workers.
        """
        rows_a_step = ceil(rows / steps)
        soonest = inf
        for worker, speed, stalled_s in zip(self._workers, self._speeds, self._stalls, strict=True):
            batch = min(speed.batch, rows_a_step if idle else rows_a_step + worker.running_samples)
            denoise_s = max(steps * speed.predict(batch), rows / speed.rows_per_s)
            soonest = min(soonest, stalled_s + denoise_s + samples * worker.decode_s)
        return soonest

    @property
    def _rows_per_s(self) -> float:
        return sum(speed.rows_per_s for speed in self._speeds)

    def _times(self, due: float) -> Iterator[tuple[float, float]]:
        """Yield for each worker the seconds of its work that is due by `due`, and its rows a second."""
        for speed, stalled_s, backlog in zip(self._speeds, self._stalls, self._demand.backlogs, strict=True):
            yield stalled_s + backlog.due_by(due) / speed.rows_per_s, speed.rows_per_s


def drain_time(load: LoadSnapshot, extra_rows: int = 0) -> float:
    """Return the seconds until backlogs, queue and `extra_rows` are done; infinite without workers."""
    return Capacity(load).drain_time(extra_rows)


def fleet_rows_per_s(load: LoadSnapshot, pass_s: float = inf) -> float:
    """Return the rows a second of all workers, in passes of up to `pass_s` seconds."""
    return sum(_speed_of(worker).within(pass_s).rows_per_s for worker in load.workers)


def backlog_time(worker: WorkerState) -> float:
    """Return the seconds of the work that a worker has claimed."""
    return worker.backlog_rows / _speed_of(worker).rows_per_s
