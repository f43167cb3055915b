"""Which rung every sample runs: quality spent so that deadlines hold.

The method: deadlines are tested in their order (processor demand, Baruah et al. 1990: one server, preempted between steps). At the
first that does not hold, of the samples due no later the one that loses least quality per row saved goes one rung down. With
room to spare for a while, one sample at a time climbs back. Nobody goes below what the request consents to, nobody is cut while
the test holds, nor for a deadline that is lost anyway. Accepted work is not evicted: what cannot be met is refused at `admission`.
Pure: time, load and costs are arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, log2

from ditserve.service.jobs import Due
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.rung import Rung

LOAD = "load"  # the machine is busy
DEADLINE = "deadline"  # too close for the rung asked for, even on an idle machine
ROOM = "room"  # back up: there is time again

HORIZONS_PER_OCTAVE = 2  # how finely dates are told apart in what is published of them
_NEAREST_S = 0.1  # sooner dates are told apart no more
_NOTHING = 1e-6  # rows: what adding up shares may leave over


@dataclass(frozen=True, slots=True)
class Policy:
    """How cautious to be. Margins stretch predicted times: little for a cut, which can still be made at the next step, more
    for a promise and for a climb."""

    margin: float = 1.02
    admission_margin: float = 1.1
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
    row_cost: float = 1.0  # tokens of one of its rows, in rows of the bundle's own size


@dataclass(frozen=True, slots=True)
class Change:
    """Move a sample to `rung`: it walks the rest of its noise in `steps_left(remaining, current, rung)` steps."""

    sample_id: str
    rung: Rung
    reason: str


_Choice = tuple[float, int, int, int]  # a cut: loss per row saved, −steps, position of the task, option


@dataclass(slots=True)
class _Task:
    """A sample under planning: the rungs it may take, dearest first, the one it is `at`, and what is left on that one."""

    sample: PlannedSample
    due: float
    options: tuple[Rung, ...]
    at: int
    steps: int
    rows: float  # of the bundle's own size
    reason: str = LOAD


@dataclass(frozen=True, slots=True)
class _Time:
    """The machine from now on: batches of `batch` rows, and how many of them end before each task is due."""

    batch: int
    budgets: list[float]


class Planner:
    """Owns the hysteresis of one worker's samples."""

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
        """The moves to make before the next step: as many cuts as deadlines need, or else at most one climb.

        `samples` are all that are claimed, running or not. `queued_rows` is this worker's share of what waits behind them: it
        is due at an unknown time, so nobody is cut for it, but nobody climbs in its way either.
        """
        dated = (sample for sample in samples if sample.deadline_at is not None)
        tasks = sorted(map(self._task, dated), key=lambda task: task.due)
        if not tasks:
            return []
        batch, tick = _passes(samples, costs, max_rows)
        time = _Time(batch, [max(0.0, task.due - now - costs.decode_s) / tick for task in tasks])
        cut = self._cut(tasks, time)
        if cut:
            self._cut_at = now
            return [Change(task.sample.id, task.options[task.at], task.reason) for task in cut]
        calm = now - self._cut_at >= self.policy.calm_s
        return self._climb(tasks, time, queued_rows, calm=calm)

    def dues(
        self, samples: Sequence[PlannedSample], now: float, costs: CostModel, *, max_rows: int
    ) -> tuple[Due, ...]:
        """What is to be done by when, dates of like distance taken together at the first of them.

        A sample takes its steps one after the other: the last is due at its deadline, each one before as much sooner as a pass
        takes. By its deadline alone a long one would seem to have time until it has none ("forced-forward demand", Baruah et al.
        2009).
        """
        _, tick = _passes(samples, costs, max_rows)
        found: dict[float, list[float]] = {}
        for task in map(self._task, samples):
            least = self._left(task, -1) if task.sample.allow_degraded else (task.steps, task.rows)
            for place, (steps, rows) in enumerate(((task.steps, task.rows), least), start=1):
                for horizon, at, share in _dates(task.due, steps, now, tick):
                    due = found.setdefault(horizon, [at, 0.0, 0.0])
                    due[0] = min(due[0], at)
                    due[place] += share * rows
        return tuple(
            Due(at, ceil(rows - _NOTHING), ceil(least - _NOTHING))
            for _, (at, rows, least) in sorted(found.items())
        )

    def _task(self, sample: PlannedSample) -> _Task:
        options: tuple[Rung, ...] = (sample.rung,)
        if sample.allow_degraded:
            ceiling = sample.requested or sample.rung
            options = (ceiling, *self.ladder.below(ceiling, sample.floor_steps))
            if sample.rung not in options:
                options = (sample.rung, *self.ladder.below(sample.rung, sample.floor_steps))
        rows = self.ladder.rows_left(sample.rung, sample.remaining_steps, sample.timestep, sample.guided)
        due = inf if sample.deadline_at is None else sample.deadline_at
        at = options.index(sample.rung)
        return _Task(sample, due, options, at, sample.remaining_steps, sample.row_cost * rows)

    def _left(self, task: _Task, option: int) -> tuple[int, float]:
        """Steps and rows left on an option, reckoned from where the sample is."""
        sample, rung = task.sample, task.options[option]
        steps = steps_left(sample.remaining_steps, sample.rung, rung)
        rows = self.ladder.rows_left(rung, steps, sample.timestep, sample.guided)
        return steps, sample.row_cost * rows

    def _cut(self, tasks: list[_Task], time: _Time) -> list[_Task]:
        """One sweep in deadline order: a cut only relieves the deadlines already tested, so none needs a second look."""
        margin, batch = self.policy.margin, time.batch
        moved: dict[str, _Task] = {}
        choices: list[_Choice] = []
        demand = least = 0.0  # rows due so far, as planned and at the floor
        offered = 0  # tasks whose cuts are among the choices
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


def _passes(samples: Sequence[PlannedSample], costs: CostModel, max_rows: int) -> tuple[int, float]:
    """Rows of a pass as long as there is so much to do, and its seconds."""
    at_once = ceil(sum(sample.row_cost * (2 if sample.guided else 1) for sample in samples))
    batch = max(1, min(costs.knee(max_rows), at_once))
    return batch, costs.predict(batch)


def _dates(due: float, steps: int, now: float, tick: float) -> Iterator[tuple[float, float, float]]:
    """By when so many steps must be taken to end at `due`: each horizon, the first date in it, and the share of them due in it."""
    if due == inf:
        yield inf, inf, 1.0
        return
    left, distance = steps, due - now
    while left:
        horizon = floor(HORIZONS_PER_OCTAVE * log2(max(distance, _NEAREST_S)))
        room = distance - 2.0 ** (horizon / HORIZONS_PER_OCTAVE)
        here = left if distance <= _NEAREST_S else min(left, 1 + floor(max(0.0, room) / tick))
        yield horizon, now + distance - (here - 1) * tick, here / steps
        left -= here
        distance -= here * tick


def seconds_header(retry_after_s: float) -> int:
    """`Retry-After` is whole seconds, at least one."""
    return max(1, ceil(retry_after_s))
