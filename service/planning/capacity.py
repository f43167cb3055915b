"""What a fleet can do by when, from the state its workers publish.

A worker is a cost line and a backlog of rows by deadline; work that is not yet claimed flows to whoever is free first. Pure: arithmetic on a
load snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf

from ditserve.service.jobs import Due, LoadSnapshot, WorkerState
from ditserve.service.planning.costs import CostModel


@dataclass(frozen=True, slots=True)
class _Pace:
    """A worker at its best batch."""

    costs: CostModel
    batch: int
    rows_per_s: float


@lru_cache(1024)
def _pace(fixed_s: float, per_row_s: float, max_rows: int) -> _Pace:
    costs = CostModel(fixed_s=max(0.0, fixed_s), per_row_s=max(1e-9, per_row_s))
    batch = costs.knee(max(1, max_rows))
    return _Pace(costs, batch, batch / costs.predict(batch))


def _pace_of(worker: WorkerState) -> _Pace:
    return _pace(worker.step_fixed_s, worker.step_per_row_s, worker.max_rows)


class Capacity:
    """A load snapshot made ready for several questions.

    With `recut` what is accepted counts at the lowest rung it consents to, because it may still be cut.
    """

    def __init__(self, load: LoadSnapshot, *, recut: bool = False) -> None:
        self._workers = [(worker, _pace_of(worker)) for worker in load.workers]
        self._dues = [
            sorted((due.at, due.floor_rows if recut else due.rows) for due in dues_of(worker))
            for worker in load.workers
        ]
        rows = sum(due.rows for worker in load.workers for due in dues_of(worker))
        counted = sum(count for dues in self._dues for _, count in dues)
        self._queued_rows = load.queued_rows * (counted / rows if rows else 1.0)  # as what is claimed already

    def reached(self, extra_rows: int = 0, *, due: float = inf) -> float:
        """Seconds until the queue, `extra_rows` behind it, and of the backlogs what is due by `due` are done.

        Infinite without workers.
        """
        waiting = self._queued_rows + extra_rows
        together, level = 0.0, 0.0  # rows a second of the workers free by the time `level`
        for backlog_s, rows_per_s in sorted(self._backlogs(due)):
            absorbed = together * (backlog_s - level)
            if together and absorbed >= waiting:
                break
            waiting -= absorbed
            level = backlog_s
            together += rows_per_s
        return level + waiting / together if together else inf

    def drained(self, extra_rows: int = 0) -> float:
        """Seconds until everything there is and `extra_rows` are done."""
        return max([self.reached(extra_rows), *(backlog_s for backlog_s, _ in self._backlogs(inf))])

    def harmed(self, extra_rows: int, due: float, *, now: float, margin: float) -> bool:
        """Whether `extra_rows` due at `due` would break a later deadline of claimed work that holds without them."""
        rows_per_s = sum(pace.rows_per_s for _, pace in self._workers)
        demand = 0
        for at, rows in sorted(each for dues in self._dues for each in dues):
            demand += rows
            room = (at - now) / margin * rows_per_s
            if due < at < inf and demand <= room < demand + extra_rows:
                return True
        return False

    def _backlogs(self, due: float) -> Iterator[tuple[float, float]]:
        """Of each worker: seconds of work due by `due`, and rows a second."""
        for (_, pace), dues in zip(self._workers, self._dues, strict=True):
            yield sum(rows for at, rows in dues if at <= due) / pace.rows_per_s, pace.rows_per_s

    def unhindered(self, *, rows: int, steps: int, samples: int, idle: bool = False) -> float:
        """Seconds for `samples` samples of `steps` steps and `rows` rows in all that are in every batch from now on.

        On the worker that does it soonest, beside what runs there, or beside nothing (`idle`).
        """
        at_once = ceil(rows / steps)
        soonest = inf
        for worker, pace in self._workers:
            batch = min(pace.batch, at_once if idle else at_once + worker.running_samples)
            seconds = (
                max(steps * pace.costs.predict(batch), rows / pace.rows_per_s) + samples * worker.decode_s
            )
            soonest = min(soonest, seconds)
        return soonest


def drained(load: LoadSnapshot, extra_rows: int = 0) -> float:
    """Seconds until the workers have done their backlogs, the queue and `extra_rows`; infinite without workers."""
    return Capacity(load).drained(extra_rows)


def dues_of(worker: WorkerState) -> tuple[Due, ...]:
    """What is not told apart by deadlines counts as due before anybody else, and not to be cut."""
    return worker.dues or (Due(-inf, worker.backlog_rows, worker.backlog_rows),)
