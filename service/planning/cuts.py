"""Cuts: the moves of samples to lower rungs that make deadlines hold. Pure: time and costs are arguments."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.rung import Consent, Rung

LOAD = "load"  # the machine is busy
DEADLINE = "deadline"  # too close for the rung asked for, even on an idle machine


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample as the planner sees it.

    `noise` is where it stands in the noise range, 0..1. `rung` is where it is, `requested` is how high it may
    climb (None: no higher). `row_cost` is the tokens of one of its rows, in rows of the bundle's own size.
    Its predictions are composed of `conditions`, a row each. `consent` matters if it `allow_degraded`.
    """

    id: str
    deadline_at: float | None
    rung: Rung
    remaining_steps: int
    guided: bool
    consent: Consent
    allow_degraded: bool
    started: bool
    noise: float
    requested: Rung | None = None
    row_cost: float = 1.0
    conditions: int = 1

    def rows_left(self, ladder: Ladder, rung: Rung, steps: int) -> float:
        """Return the rows of so many last steps on a rung, in rows of the bundle's own size."""
        return self.row_cost * ladder.rows_left(rung, steps, self.noise, self.guided, self.conditions)


@dataclass(slots=True)
class Task:
    """A sample under planning.

    `options` are the rungs it may take, dearest first, and `at` is the index of the one it is on. `steps` and
    `rows` are left on that one, rows in those of the bundle's own size. `reason` is that of a cut.
    """

    sample: PlannedSample
    ladder: Ladder
    deadline: float
    options: tuple[Rung, ...]
    at: int
    steps: int
    rows: float
    reason: str = LOAD

    @classmethod
    def of(cls, sample: PlannedSample, ladder: Ladder) -> Task:
        """Return the task of a sample that stays on its rung."""
        options: tuple[Rung, ...] = (sample.rung,)
        if sample.allow_degraded:
            ceiling = sample.requested or sample.rung
            options = (ceiling, *ladder.below(ceiling, sample.consent))
            if sample.rung not in options:
                options = (sample.rung, *ladder.below(sample.rung, sample.consent))
        deadline = inf if sample.deadline_at is None else sample.deadline_at
        rows = sample.rows_left(ladder, sample.rung, sample.remaining_steps)
        at = options.index(sample.rung)
        return cls(sample, ladder, deadline, options, at, sample.remaining_steps, rows)

    def left(self, option: int) -> tuple[int, float]:
        """Return the steps and rows left on an option, from where the sample is now."""
        sample, rung = self.sample, self.options[option]
        steps = steps_left(sample.remaining_steps, sample.rung, rung) if sample.started else rung.walked
        return steps, sample.rows_left(self.ladder, rung, steps)

    def floor(self) -> tuple[int, float]:
        """Return the steps and rows left on the lowest option."""
        return self.left(-1)

    def move(self, option: int) -> None:
        self.at = option
        self.steps, self.rows = self.left(option)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The machine from now on: passes of `batch` rows, and how many of them each task has."""

    batch: float
    passes: list[float]


class Cut(NamedTuple):
    """A possible cut of the task at `position` to its `option`.

    The least is the best: it loses the least quality per row saved. Among equals the rung of most steps is
    cut first, then the earliest deadline.
    """

    loss_per_row: float
    minus_steps: int
    position: int
    option: int


class CutSweep:
    """One sweep over the tasks in the order of deadlines, which cuts where a deadline does not hold.

    The test is that of processor demand: all rows due by a deadline must fit in the passes before it, and so
    must the task's own steps, one a pass. Where it fails, the cheapest cuts among the tasks due no later are
    made until it holds. Such a cut only relieves the deadlines tested before, so one sweep is enough. Nothing
    is cut for a deadline that cannot be met even if every task due by then went to its floor.

    Example: a pass has 2 rows, every step is one row, and predictions are not stretched (margin 1). The
    ladder has rungs of 20, 10 and 6 steps with quality 0, 1 and 3; lower is better. Tasks A, B and C each
    have 10 steps left: A and C all of the 10-step rung, B the second half of the 20-step rung. They are due
    in 10, 12 and 14 passes. C may not be cut.

        A: 10 rows are due and 10 · 2 = 20 fit: it holds.
        B: 10 + 10 = 20 rows are due and 24 fit: it holds.
        C: 30 rows are due and 28 fit: it is overdue. With A and B at their floors of 6 and 3 rows 19 would be
           due, so it can be saved. A to 6 steps saves 4 rows and loses 3 - 1 = 2, or 0.5 a row. B to 10 steps
           saves 5 of its 10 rows and loses 1 - 0 over half of its way, or 0.1 a row. B is cut: 25 rows are
           due, and C holds.
    """

    def __init__(self, tasks: Sequence[Task], timeline: Timeline, *, margin: float) -> None:
        self._tasks, self._timeline, self._margin = tasks, timeline, margin
        self._demand = 0.0  # rows due so far, as planned
        self._floor_demand = 0.0  # rows due so far if everything went to its floor; of the offered tasks
        self._offered = 0  # the first so many tasks have their cuts among the choices
        self._choices: list[Cut] = []  # a heap; a cut is stale once its task was moved as far or further
        self._moved: dict[str, Task] = {}

    def run(self) -> list[Task]:
        """Cut tasks in place; return those that were cut."""
        for position, (task, passes) in enumerate(zip(self._tasks, self._timeline.passes, strict=True)):
            self._demand += task.rows
            if not self._overdue(task, passes):
                continue
            self._offer_until(position)
            if not self._can_be_saved(task, passes):
                continue
            self._hasten(task, position, passes)
            while self._overloaded(passes) and (cut := self._cheapest_cut()) is not None:
                self._make(cut)
        return list(self._moved.values())

    def _overdue(self, task: Task, passes: float) -> bool:
        """Return whether a deadline does not hold: the task's own steps, or all rows due, do not fit."""
        return task.steps * self._margin > passes or self._overloaded(passes)

    def _overloaded(self, passes: float) -> bool:
        return self._demand * self._margin > passes * self._timeline.batch

    def _can_be_saved(self, task: Task, passes: float) -> bool:
        """Return whether the deadline could be met with every task due by then at its floor."""
        return self._floor_demand <= passes * self._timeline.batch and task.floor()[0] <= passes

    def _cheapest_cut(self) -> Cut | None:
        """Take the best of the choices that is not stale."""
        while self._choices:
            cut = heapq.heappop(self._choices)
            if cut.option > self._tasks[cut.position].at:
                return cut
        return None

    def _make(self, cut: Cut) -> None:
        task = self._tasks[cut.position]
        self._demand -= task.rows
        task.move(cut.option)
        self._demand += task.rows
        self._moved[task.sample.id] = task
        self._offer(task, cut.position)

    def _hasten(self, task: Task, position: int, passes: float) -> None:
        """Cut a task until its own steps fit in the passes that it has."""
        before = task.at
        self._demand -= task.rows
        while task.steps * self._margin > passes and task.at + 1 < len(task.options):
            task.move(task.at + 1)
            task.reason = DEADLINE
        self._demand += task.rows
        if task.at > before:
            self._moved[task.sample.id] = task
            self._offer(task, position)

    def _offer_until(self, position: int) -> None:
        """Offer the cuts of all tasks up to a position, and count their floors."""
        for earlier in range(self._offered, position + 1):
            task = self._tasks[earlier]
            self._floor_demand += task.floor()[1]
            self._offer(task, earlier)
        self._offered = position + 1

    def _offer(self, task: Task, position: int) -> None:
        """Put the next cut of a task that saves a row among the choices."""
        for option in range(task.at + 1, len(task.options)):
            _, rows = task.left(option)
            if rows < task.rows:
                here, there = task.options[task.at], task.options[option]
                share = task.sample.remaining_steps / task.sample.rung.steps
                loss = share * (there.quality - here.quality) / (task.rows - rows)
                heapq.heappush(self._choices, Cut(loss, -here.steps, position, option))
                return
