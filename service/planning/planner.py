"""Which rung every sample runs, and whether a newcomer can be taken: quality spent so that deadlines hold.

The method: deadlines are tested in their order (processor demand, Baruah et al. 1990: one server, preempted between steps). At the
first that does not hold, of the samples due no later the one that loses least quality per row saved goes one rung down. With
room to spare for a while, one sample at a time climbs back. Nobody goes below what the request consents to, nobody is cut while
the test holds, nor for a deadline that is lost anyway. Accepted work is not evicted: what cannot be met is refused at admission. Pure:
time, load and costs are arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from service.jobs import LoadSnapshot
from service.planning.capacity import Capacity
from service.planning.capacity import drained as drained
from service.planning.costs import CostModel
from service.planning.rungs import Ladder, Rung, steps_left

LOAD = "load"  # the machine is busy
DEADLINE = "deadline"  # too close for the rung asked for, even on an idle machine
ROOM = "room"  # back up: there is time again
NO_WORKER = "no-worker"

FLOOR_SMOOTHING = 0.05
UNDER_WAY = (
    1.5  # a sample under way has on average two thirds of its rows to go, what is claimed ahead included
)


@dataclass(frozen=True, slots=True)
class Policy:
    """How cautious to be. Margins stretch predicted times."""

    margin: float = 1.1
    climb_margin: float = 1.3
    calm_s: float = 1.0  # a started sample climbs only so long after the last cut
    recut: bool = True  # what was accepted may still be cut, so admission counts on it
    retry_s: float = 5.0  # when to come back if nothing can be predicted


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample as the planner sees it. `rung` is where it is, `requested` how high it may climb (None: no higher)."""

    id: str
    deadline_at: float | None
    rung: Rung
    remaining_steps: int
    guided: bool
    floor_steps: int
    allow_degraded: bool
    started: bool
    timestep: int
    requested: Rung | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Move a sample to `rung`: it walks the rest of its noise in `steps_left(remaining, current, rung)` steps."""

    sample_id: str
    rung: Rung
    reason: str


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to a newcomer. `predicted_s` is the time to its last image.

    `retry_after_s` is set when it is refused and coming back later would help.
    """

    accepted: bool
    rung: Rung
    degraded: bool
    reason: str | None
    retry_after_s: float | None
    predicted_s: float


_Choice = tuple[float, int, int, int]  # a cut: loss per row saved, −steps, position of the task, option


@dataclass(slots=True)
class _Task:
    """A sample under planning: the rungs it may take, dearest first, the one it is `at`, and what is left on that one."""

    sample: PlannedSample
    due: float
    options: tuple[Rung, ...]
    at: int
    steps: int
    rows: int
    reason: str = LOAD


@dataclass(frozen=True, slots=True)
class _Time:
    """The machine from now on: batches of `batch` rows, and how many of them end before each task is due."""

    batch: int
    budgets: list[float]


class Planner:
    """Owns the hysteresis of one worker's samples, and of one admission desk what its traffic consents to on average."""

    def __init__(self, ladder: Ladder, policy: Policy | None = None) -> None:
        self.ladder = ladder
        self.policy = policy or Policy()
        self._cut_at = -inf
        self._floor_rows: float | None = None  # of an accepted sample at its lowest rung, smoothed

    def plan(
        self,
        samples: Sequence[PlannedSample],
        now: float,
        costs: CostModel,
        *,
        max_rows: int,
        queued_rows: int = 0,
    ) -> list[Change]:
        """The moves to make before the next step: as many cuts as deadlines need, or else at most one climb.

        `samples` are all that are claimed, running or not. `queued_rows` is this worker's share of what waits behind them: it
        is due at an unknown time, so nobody is cut for it, but nobody climbs in its way either.
        """
        dated = (sample for sample in samples if sample.deadline_at is not None)
        tasks = sorted(map(self._task, dated), key=lambda task: task.due)
        if not tasks:
            return []
        at_once = sum(2 if sample.guided else 1 for sample in samples)
        batch = min(costs.knee(max_rows), at_once)
        tick = costs.predict(batch)
        time = _Time(batch, [max(0.0, task.due - now - costs.decode_s) / tick for task in tasks])
        cut = self._cut(tasks, time)
        if cut:
            self._cut_at = now
            return [Change(task.sample.id, task.options[task.at], task.reason) for task in cut]
        calm = now - self._cut_at >= self.policy.calm_s
        return self._climb(tasks, time, queued_rows, calm=calm)

    def _task(self, sample: PlannedSample) -> _Task:
        options: tuple[Rung, ...] = (sample.rung,)
        if sample.allow_degraded:
            ceiling = sample.requested or sample.rung
            options = (ceiling, *self.ladder.below(ceiling, sample.floor_steps))
            if sample.rung not in options:
                options = (sample.rung, *self.ladder.below(sample.rung, sample.floor_steps))
        rows = self.ladder.rows_left(sample.rung, sample.remaining_steps, sample.timestep, sample.guided)
        due = inf if sample.deadline_at is None else sample.deadline_at
        return _Task(sample, due, options, options.index(sample.rung), sample.remaining_steps, rows)

    def _left(self, task: _Task, option: int) -> tuple[int, int]:
        """Steps and rows left on an option, reckoned from where the sample is."""
        sample, rung = task.sample, task.options[option]
        steps = steps_left(sample.remaining_steps, sample.rung, rung)
        return steps, self.ladder.rows_left(rung, steps, sample.timestep, sample.guided)

    def _cut(self, tasks: list[_Task], time: _Time) -> list[_Task]:
        """One sweep in deadline order: a cut only relieves the deadlines already tested, so none needs a second look."""
        margin, batch = self.policy.margin, time.batch
        moved: dict[str, _Task] = {}
        choices: list[_Choice] = []
        demand = least = offered = (
            0  # rows due so far, as planned and at the floor; tasks whose cuts are among the choices
        )
        for position, (task, budget) in enumerate(zip(tasks, time.budgets, strict=True)):
            demand += task.rows
            if task.steps * margin <= budget and demand * margin <= budget * batch:
                continue
            for earlier in range(offered, position + 1):
                least += self._left(tasks[earlier], -1)[1]
                self._offer(choices, tasks[earlier], earlier)
            offered = position + 1
            if least > budget * batch or self._left(task, -1)[0] > budget:
                continue  # lost
            demand -= task.rows
            if self._hasten(task, budget):
                moved[task.sample.id] = task
                self._offer(choices, task, position)
            demand += task.rows
            while demand * margin > budget * batch and choices:
                _, _, chosen, option = heapq.heappop(choices)
                victim = tasks[chosen]
                if option <= victim.at:
                    continue  # offered before it was hastened
                demand -= victim.rows
                victim.at = option
                victim.steps, victim.rows = self._left(victim, option)
                demand += victim.rows
                moved[victim.sample.id] = victim
                self._offer(choices, victim, chosen)
        return list(moved.values())

    def _hasten(self, task: _Task, budget: float) -> bool:
        """Cut a task until it is done in time if it is in every batch; whether that took a cut."""
        before = task.at
        while task.steps * self.policy.margin > budget and task.at + 1 < len(task.options):
            task.at += 1
            task.steps, task.rows = self._left(task, task.at)
            task.reason = DEADLINE
        return task.at > before

    def _offer(self, choices: list[_Choice], task: _Task, position: int) -> None:
        """Put the task's next cut that saves a row among the choices."""
        for option in range(task.at + 1, len(task.options)):
            _, rows = self._left(task, option)
            if rows < task.rows:
                here, there = task.options[task.at], task.options[option]
                share = task.sample.remaining_steps / task.sample.rung.steps
                loss = share * (there.quality - here.quality) / (task.rows - rows)
                heapq.heappush(choices, (loss, -here.steps, position, option))
                return

    def _climb(self, tasks: list[_Task], time: _Time, queued: int, *, calm: bool) -> list[Change]:
        """The one climb that gains most quality per row, if every deadline then still holds with room."""
        margin = self.policy.climb_margin
        demand = sum(task.rows for task in tasks)
        room = inf  # rows to spare before the tightest of the deadlines seen so far, the last first
        best: tuple[float, Change] | None = None
        for task, budget in zip(reversed(tasks), reversed(time.budgets), strict=True):
            room = min(room, budget * time.batch / margin - demand - queued)
            queued = 0  # it is behind the last of them
            demand -= task.rows
            if task.at == 0 or not (calm or not task.sample.started):
                continue
            steps, rows = self._left(task, task.at - 1)
            extra = rows - task.rows
            if not 0 < extra <= room or steps * margin > budget:
                continue
            above = task.options[task.at - 1]
            gain = (task.options[task.at].quality - above.quality) / extra
            if best is None or gain > best[0]:
                best = gain, Change(task.sample.id, above, ROOM)
        return [best[1]] if best else []

    def admit(
        self,
        load: LoadSnapshot,
        *,
        rung: Rung,
        guidance_scale: float,
        samples: int,
        deadline_at: float | None,
        allow_degraded: bool,
        min_steps: int,
        now: float,
    ) -> Admission:
        """Take a newcomer, at the best rung that keeps its deadline behind everything accepted before, or say when to come back.

        Without a deadline everything is taken as asked: the queue's bound is the only limit.
        """
        if not load.workers:
            reason, retry = (None, None) if deadline_at is None else (NO_WORKER, self.policy.retry_s)
            return Admission(deadline_at is None, rung, False, reason, retry, inf)
        capacity = Capacity(load)
        share = self._floor_share(capacity)
        options = (rung, *(self.ladder.below(rung, min_steps) if allow_degraded else ()))
        slack = (inf if deadline_at is None else deadline_at - now) / self.policy.margin
        rows, predicted = 0, inf
        for option in options:
            rows = samples * self.ladder.row_steps(option, guidance_scale)
            alone = capacity.unhindered(rows=rows, steps=option.steps, samples=samples)
            predicted = max(alone, capacity.reached(rows, share=share))
            if predicted <= slack:
                self._learn_floor(self.ladder.row_steps(options[-1], guidance_scale))
                degraded = option != rung
                return Admission(True, option, degraded, LOAD if degraded else None, None, predicted)
        if capacity.unhindered(rows=rows, steps=options[-1].steps, samples=samples, idle=True) > slack:
            return Admission(False, rung, False, DEADLINE, None, predicted)
        return Admission(False, rung, False, LOAD, max(1.0, predicted - slack), predicted)

    def _floor_share(self, capacity: Capacity) -> float:
        """What would be left of the backlog with everybody at the lowest rung they consent to, as far as can be told from here."""
        mean = capacity.mean_backlog
        if not self.policy.recut or not mean or self._floor_rows is None:
            return 1.0
        return min(1.0, self._floor_rows / (UNDER_WAY * mean))

    def _learn_floor(self, rows: int) -> None:
        before = rows if self._floor_rows is None else self._floor_rows
        self._floor_rows = before + FLOOR_SMOOTHING * (rows - before)


def seconds_header(retry_after_s: float) -> int:
    """`Retry-After` is whole seconds, at least one."""
    return max(1, ceil(retry_after_s))
