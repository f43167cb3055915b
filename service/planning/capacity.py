"""Capacity: what a fleet can do by when, from the state its workers publish.

A worker is a cost model and a backlog of rows by deadline. Work that no worker has claimed yet flows to
whichever is free first. Pure: arithmetic on a load snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf

from ditserve.service.jobs import LoadSnapshot, WorkerState
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.demand import demand_of

REPORTED_S = 0.5  # seconds within which a worker that is well reports again

_ROUNDING = 1e-9  # a batch that fits but for the rounding of floats fits


@dataclass(frozen=True, slots=True)
class _Speed:
    """A worker at the batch it will run: its cost model, the rows of that batch, and rows a second."""

    costs: CostModel
    batch: int
    rows_per_s: float


@lru_cache(1024)
def _saturated(fixed_s: float, per_row_s: float, max_rows: int, batch_rows: int) -> _Speed:
    """Return the speed of a worker at the batch that it says it runs, or else at the best by its costs."""
    costs = CostModel(fixed_s=max(0.0, fixed_s), per_row_s=max(1e-9, per_row_s))
    batch = batch_rows or costs.saturation_rows(max(1, max_rows))
    return _Speed(costs, batch, batch / costs.predict(batch))


def _speed_of(worker: WorkerState, pass_s: float = inf, slowness: float = 1.0) -> _Speed:
    """Return the speed of a worker at its best batch, or at the largest whose passes take up to `pass_s`.

    Its steps take `slowness` times as long as it reports.
    """
    fixed_s, per_row_s = worker.step_fixed_s * slowness, worker.step_per_row_s * slowness
    best = _saturated(fixed_s, per_row_s, worker.max_rows, worker.batch_rows)
    if best.costs.predict(best.batch) <= pass_s:
        return best
    costs = best.costs
    batch = max(1, int((pass_s - costs.fixed_s) / costs.per_row_s * (1.0 + _ROUNDING)))
    return _Speed(costs, batch, batch / costs.predict(batch))


def _stalled_s(worker: WorkerState, speed: _Speed, now: float) -> float:
    """Return the seconds for which a worker is taken to go on standing still.

    Stalls are heavy-tailed: one lasts, on average, as long again as it has lasted. A worker stalls once its
    step takes longer than predicted, or its report is late.

    Example: a step of the best batch takes 0.2 s, and reports come every 0.5 s. The last report is 0.6 s old
    and says that the last step had ended 0.9 s before. The worker is late by 0.6 + 0.9 - 0.2 - 0.5 = 0.8 s,
    and is taken to go on in 0.8 s.
    """
    unheard_s = now - worker.updated_at + worker.last_step_age_s
    return max(0.0, unheard_s - speed.costs.predict(speed.batch) - REPORTED_S)


def _slowness(worker: WorkerState, within_s: float) -> float:
    """Return how many times as long as reported the steps of a worker may take over `within_s` seconds."""
    told = [spell.factor for spell in worker.slow if spell.over_s <= within_s]
    return told[-1] if told else max((spell.factor for spell in worker.slow), default=1.0)


class Capacity:
    """A load snapshot made ready for several questions.

    With `recut` accepted work counts at the lowest rung it consents to, because it may still be cut. Passes
    take up to `pass_s` seconds: an engine full of work without laxity runs no longer ones, whatever batch is
    its best. Where it must hold for `within_s` seconds, workers are as slow as they may be over such a time;
    without it they are as they are now.

    Example: passes take 20 ms and 5 ms a row, and the best batch of 64 rows takes 340 ms: 188 rows a second.
    50 steps that are due in 4 s leave 80 ms a pass. That is enough for 12 rows, so the worker counts for 150
    rows a second.
    """

    def __init__(
        self, load: LoadSnapshot, *, recut: bool = False, pass_s: float = inf, within_s: float | None = None
    ) -> None:
        self._workers = [
            (worker, _speed_of(worker, pass_s, 1.0 if within_s is None else _slowness(worker, within_s)))
            for worker in load.workers
        ]
        self._stalls = [_stalled_s(worker, speed, load.taken_at) for worker, speed in self._workers]
        demands = [demand_of(worker) for worker in load.workers]
        self._demands: list[list[tuple[float, int]]] = [
            sorted((bucket.at, bucket.floor_rows if recut else bucket.rows) for bucket in demand)
            for demand in demands
        ]  # by worker: (deadline, rows)
        claimed = sum(bucket.rows for demand in demands for bucket in demand)
        counted = sum(rows for demand in self._demands for _, rows in demand)
        # The queue has no floors of its own: it is taken to be as willing to be cut as the claimed work.
        self._queued_rows = load.queued_rows * (counted / claimed if claimed else 1.0)

    def queue_drain_time(self, extra_rows: int = 0, *, due: float = inf) -> float:
        """Return the seconds until the queue, `extra_rows` behind it, and backlogs due by `due` are done.

        The queue is water filling: workers join as their backlog ends, and all that have joined share the
        queue by their speeds. Infinite without workers.

        Example: 150 rows are queued. A has a backlog of 10 s, B of 20 s, and each does 5 rows a second. From
        10 s to 20 s A alone does 50 rows. From then on both do the other 100, 10 rows a second: the queue is
        done after 30 s.
        """
        waiting = self._queued_rows + extra_rows
        rate, joined_at = 0.0, 0.0  # of the workers that have joined, and when the last of them did
        for backlog_s, rows_per_s in sorted(self._backlogs(due)):
            absorbed = rate * (backlog_s - joined_at)
            if rate and absorbed >= waiting:
                break
            waiting -= absorbed
            joined_at = backlog_s
            rate += rows_per_s
        return joined_at + waiting / rate if rate else inf

    def drain_time(self, extra_rows: int = 0) -> float:
        """Return the seconds until everything claimed, the queue and `extra_rows` are done."""
        backlogs = [backlog_s for backlog_s, _ in self._backlogs(inf)]
        return max([self.queue_drain_time(extra_rows), *backlogs])

    def fleet_time(self, rows: int) -> float:
        """Return the seconds that `rows` take all workers together. There must be one."""
        return rows / sum(speed.rows_per_s for _, speed in self._workers)

    def breaks_later_deadline(self, extra_rows: int, due: float, *, now: float, margin: float) -> bool:
        """Return whether `extra_rows` due at `due` would break a later deadline of claimed work.

        A deadline that does not hold without them is not counted.

        Example: the fleet does 10 rows a second, the margin is 1, and 80 claimed rows are due in 10 s. 30
        more rows due in 5 s would make 110 rows due in the 10 s in which 100 can be done: true. If 120 rows
        were due in 10 s anyway, that deadline could not hold without them either: false.
        """
        rows_per_s = sum(speed.rows_per_s for _, speed in self._workers)
        demand = 0
        for at, rows in sorted(bucket for demands in self._demands for bucket in demands):
            demand += rows
            room = (at - now) / margin * rows_per_s
            if due < at < inf and demand <= room < demand + extra_rows:
                return True
        return False

    def time_in_every_batch(self, *, rows: int, steps: int, samples: int, idle: bool = False) -> float:
        """Return the seconds of `samples` samples of `steps` steps, `rows` rows in all, decoding included.

        The samples are in every batch from now on, on the worker that is done soonest. Its batches also have
        a row of each sample that runs there, or with `idle` no other rows. Infinite without workers.
        """
        rows_a_step = ceil(rows / steps)
        soonest = inf
        for (worker, speed), stalled_s in zip(self._workers, self._stalls, strict=True):
            batch = min(speed.batch, rows_a_step if idle else rows_a_step + worker.running_samples)
            denoise_s = max(steps * speed.costs.predict(batch), rows / speed.rows_per_s)
            soonest = min(soonest, stalled_s + denoise_s + samples * worker.decode_s)
        return soonest

    def _backlogs(self, due: float) -> Iterator[tuple[float, float]]:
        """Yield for each worker the seconds of its work that is due by `due`, and its rows a second."""
        for (_, speed), stalled_s, demand in zip(self._workers, self._stalls, self._demands, strict=True):
            backlog_s = sum(rows for at, rows in demand if at <= due) / speed.rows_per_s
            yield stalled_s + backlog_s, speed.rows_per_s


def drain_time(load: LoadSnapshot, extra_rows: int = 0) -> float:
    """Return the seconds until backlogs, queue and `extra_rows` are done; infinite without workers."""
    return Capacity(load).drain_time(extra_rows)


def fleet_rows_per_s(load: LoadSnapshot, pass_s: float = inf) -> float:
    """Return the rows a second of all workers, in passes of up to `pass_s` seconds."""
    return sum(_speed_of(worker, pass_s).rows_per_s for worker in load.workers)


def idle_time(load: LoadSnapshot, rows: int, steps: int, samples: int) -> float:
    """Return the seconds of `samples` samples of `steps` steps, `rows` rows in all, on idle workers."""
    return Capacity(load).time_in_every_batch(rows=rows, steps=steps, samples=samples, idle=True)


def backlog_time(worker: WorkerState) -> float:
    """Return the seconds of the work that a worker has claimed."""
    return worker.backlog_rows / _speed_of(worker).rows_per_s
