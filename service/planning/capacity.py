"""What a fleet can do by when, from the state its workers publish.

A worker is a cost line and a backlog of rows; work that is not yet claimed flows to whoever is free first. Pure: arithmetic on a
load snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf

from service.jobs import LoadSnapshot, WorkerState
from service.planning.costs import CostModel


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
    """A load snapshot made ready for several questions."""

    def __init__(self, load: LoadSnapshot) -> None:
        self._queued_rows = load.queued_rows
        self._workers = [(worker, _pace_of(worker)) for worker in load.workers]
        self._free = sorted(
            (worker.backlog_rows / pace.rows_per_s, pace.rows_per_s) for worker, pace in self._workers
        )
        self.last_free_s = self._free[-1][0] if self._free else 0.0
        running = sum(worker.running_samples for worker in load.workers)
        backlog = sum(worker.backlog_rows for worker in load.workers)
        self.mean_backlog = backlog / running if running else None  # rows left of a running sample

    def reached(self, extra_rows: int = 0, *, share: float = 1.0) -> float:
        """Seconds until the queue and `extra_rows` behind it are done; infinite without workers.

        `share` is what counts of the backlogs and the queue: the rest may still be cut.
        """
        waiting = self._queued_rows * share + extra_rows
        together, level = 0.0, 0.0  # rows a second of the workers free by the time `level`
        for backlog_s, rows_per_s in self._free:
            absorbed = together * (backlog_s * share - level)
            if together and absorbed >= waiting:
                break
            waiting -= absorbed
            level = backlog_s * share
            together += rows_per_s
        return level + waiting / together if together else inf

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
    capacity = Capacity(load)
    return max(capacity.reached(extra_rows), capacity.last_free_s)
