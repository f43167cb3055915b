"""The planner: the rung that every sample runs, so that quality is spent where deadlines need it.

Deadlines are tested in their order (processor demand, Baruah et al. 1990: one server, preempted between
steps). At the first that does not hold, of the samples due no later the one that loses least quality per row
saved goes one rung down (`cuts`). With room to spare for a while, one sample at a time climbs back. No sample
goes below what its request consents to. None is cut while the test holds, nor for a deadline that cannot be
met anyway. Accepted work is not evicted: what cannot be met is refused at `admission`. Pure: time, load and
costs are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from ditserve.model.spec.stretches import stretch_at
from ditserve.service.fleet import DemandBucket
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.cuts import DEADLINE, LOAD, CutSweep, PlannedSample, Task, Timeline
from ditserve.service.planning.demand import demand_buckets
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung

__all__ = ["DEADLINE", "LOAD", "ROOM", "Change", "PlannedSample", "Planner", "Policy"]

ROOM = "room"  # back up: there is time again

_ROUNDING_ROWS = 1e-6  # rows that adding up shares may leave over


@dataclass(frozen=True, slots=True)
class Policy:
    """The caution of planning and admission.

    Margins stretch predicted times: little for a cut, which can still be made at the next step, more for a
    promise and for a climb.
    """

    margin: float = 1.02
    admission_margin: float = 1.1
    climb_margin: float = 1.3
    calm_s: float = 1.0  # a started sample climbs only so long after the last cut
    recut: bool = True  # what was accepted may still be cut, so admission counts on it
    retry_s: float = 5.0  # when to come back if nothing can be predicted


@dataclass(frozen=True, slots=True)
class Change:
    """A move of a sample to `rung`, on which it has `steps_left(remaining, current, rung)` steps left."""

    sample_id: str
    rung: Rung
    reason: str


@dataclass(slots=True)
class _BucketTotal:
    """The rows of all samples in one bucket, as planned and at their floors; the first is due at `at`."""

    at: float
    rows: float = 0.0
    floor_rows: float = 0.0

    def add(self, at: float, *, rows: float = 0.0, floor_rows: float = 0.0) -> None:
        self.at = min(self.at, at)
        self.rows += rows
        self.floor_rows += floor_rows


class Planner:
    """The planner of one worker's samples. It remembers when it last cut."""

    def __init__(self, ladder: Ladder, policy: Policy | None = None) -> None:
        self.ladder = ladder
        self.policy = policy or Policy()
        self._cut_at = -inf

    def plan(
        self,
        samples: Sequence[PlannedSample],
        now: float,
        costs: CostModel,
        *,
        max_rows: int,
        queued_rows: int = 0,
    ) -> list[Change]:
        """Return the moves to make before the next step: the cuts that deadlines need, or else one climb.

        `samples` are all that are claimed, running or not. `queued_rows` is this worker's share of what waits
        behind them. It is due at an unknown time: no sample is cut for it, and none climbs in its way.
        """
        dated = [sample for sample in samples if sample.deadline_at is not None]
        tasks = sorted((Task.of(sample, self.ladder) for sample in dated), key=lambda task: task.deadline)
        if not tasks:
            return []
        batch, pass_s = _pass(samples, costs, max_rows)
        passes = [max(0.0, task.deadline - now - costs.decode_s) / pass_s for task in tasks]
        timeline = Timeline(batch, passes)
        cut = CutSweep(tasks, timeline, margin=self.policy.margin).run()
        if cut:
            self._cut_at = now
            return [Change(task.sample.id, task.options[task.at], task.reason) for task in cut]
        calm = now - self._cut_at >= self.policy.calm_s
        return self._climb(tasks, timeline, queued_rows, calm=calm)

    def demand(
        self, samples: Sequence[PlannedSample], now: float, costs: CostModel, *, max_rows: int
    ) -> tuple[DemandBucket, ...]:
        """Return the row-steps of all samples by when they are due, the soonest first."""
        _, pass_s = _pass(samples, costs, max_rows)
        totals: dict[float, _BucketTotal] = {}
        for sample in samples:
            task = Task.of(sample, self.ladder)
            floor_steps, floor_rows = task.floor() if sample.allow_degraded else (task.steps, task.rows)
            for bucket in demand_buckets(task.deadline, task.steps, now, pass_s):
                total = totals.setdefault(bucket.interval, _BucketTotal(bucket.at))
                total.add(bucket.at, rows=bucket.share * task.rows)
            for bucket in demand_buckets(task.deadline, floor_steps, now, pass_s):
                total = totals.setdefault(bucket.interval, _BucketTotal(bucket.at))
                total.add(bucket.at, floor_rows=bucket.share * floor_rows)
        return tuple(
            DemandBucket(total.at, ceil(total.rows - _ROUNDING_ROWS), ceil(total.floor_rows - _ROUNDING_ROWS))
            for _, total in sorted(totals.items(), key=lambda item: item[0])
        )

    def _climb(self, tasks: list[Task], timeline: Timeline, queued_rows: int, *, calm: bool) -> list[Change]:
        """Return the one climb that gains most quality per row, if every deadline then still holds with room.

        A climb must leave room before its own deadline and every later one, so the tasks are seen from the
        last to the first.

        Example: passes have 2 rows, the climb margin is 1, and one task of 20 guided steps, 40 rows, is
        due in 40 passes. There is room for 40 · 2 - 40 = 40 rows. One rung up, to 30 steps, adds 20 rows: it
        climbs. A rung of 50 steps would add 60 rows: it would stay.
        """
        margin = self.policy.climb_margin
        demand = sum(task.rows for task in tasks)
        room = inf  # rows to spare before the tightest of the deadlines seen so far
        best: tuple[float, Change] | None = None
        for task, passes in zip(reversed(tasks), reversed(timeline.passes), strict=True):
            room = min(room, passes * timeline.batch / margin - demand - queued_rows)
            queued_rows = 0  # the queue is behind the last task only
            demand -= task.rows
            if task.at == 0 or not (calm or not task.sample.started):
                continue
            steps, rows = task.left(task.at - 1)
            extra = rows - task.rows
            if not 0 < extra <= room or steps * margin > passes:
                continue
            above = task.options[task.at - 1]
            gain = (task.options[task.at].quality - above.quality) / extra
            if best is None or gain > best[0]:
                best = gain, Change(task.sample.id, above, ROOM)
        return [best[1]] if best else []


def _pass(samples: Sequence[PlannedSample], costs: CostModel, max_rows: int) -> tuple[float, float]:
    """Return the rows of a pass while all samples are there, and its seconds.

    Rows of different sizes or backbones share no pass: where samples are of several, it is one pass of each.
    """
    saturation = costs.saturation_rows(max_rows)
    rows: dict[tuple[str, float, float], int] = {}
    for sample in samples:
        part = stretch_at(sample.rung.stretches, sample.noise)
        key = part.backbone, part.row_cost, sample.row_cost
        rows[key] = rows.get(key, 0) + sample.conditions + (sample.guided and part.guided)
    batch = seconds = 0.0
    for (_, backbone_cost, size_cost), at_once in rows.items():
        # In rows of the bundle's own size. A pass has one row at least, however large.
        together = max(ceil(size_cost), min(saturation, ceil(size_cost * at_once)))
        batch += backbone_cost * together
        seconds += backbone_cost * costs.predict(together)
    return batch or 1.0, seconds or costs.predict(1)
