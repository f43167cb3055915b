"""Whether a newcomer can be taken, at which rung, and if not when to come back.

Decided from what the workers publish, so that a full house answers at once. Work goes in the order of deadlines: a newcomer waits
for what is due before its own, and may be taken only if what is due later still holds. Pure: time and load are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

from ditserve.service.jobs import LoadSnapshot
from ditserve.service.planning.capacity import Capacity
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import DEADLINE, LOAD, Policy
from ditserve.service.rung import Rung

NO_WORKER = "no-worker"


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


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A request for `samples` images at `rung`. `row_cost` is the tokens of a row, in rows of the bundle's own size."""

    rung: Rung
    guidance_scale: float
    samples: int
    deadline_at: float | None
    allow_degraded: bool
    min_steps: int
    row_cost: float = 1.0


def admit(
    newcomer: Newcomer, load: LoadSnapshot, *, ladder: Ladder, now: float, policy: Policy | None = None
) -> Admission:
    """Take a newcomer at the best rung that keeps its deadline and everybody else's, or say when to come back.

    Without a deadline everything is taken as asked: the queue's bound is the only limit.
    """
    policy = policy or Policy()
    rung, deadline_at = newcomer.rung, newcomer.deadline_at
    if not load.workers:
        reason, retry = (None, None) if deadline_at is None else (NO_WORKER, policy.retry_s)
        return Admission(deadline_at is None, rung, False, reason, retry, inf)
    capacity = Capacity(load, recut=policy.recut)
    due = inf if deadline_at is None else deadline_at
    slack = (due - now) / policy.admission_margin
    options = (rung, *(ladder.below(rung, newcomer.min_steps) if newcomer.allow_degraded else ()))
    rows, predicted = 0, inf
    for option in options:
        rows = _rows(newcomer, ladder, option)
        alone = capacity.unhindered(rows=rows, steps=option.steps, samples=newcomer.samples)
        predicted = max(alone, capacity.reached(rows, due=due))
        if predicted <= slack and not capacity.harmed(rows, due, now=now, margin=policy.admission_margin):
            degraded = option != rung
            return Admission(True, option, degraded, LOAD if degraded else None, None, predicted)
    idle = capacity.unhindered(rows=rows, steps=options[-1].steps, samples=newcomer.samples, idle=True)
    if idle > slack:
        return Admission(False, rung, False, DEADLINE, None, predicted)
    return Admission(False, rung, False, LOAD, max(1.0, predicted - slack), predicted)


def _rows(newcomer: Newcomer, ladder: Ladder, rung: Rung) -> int:
    return ceil(newcomer.samples * newcomer.row_cost * ladder.row_steps(rung, newcomer.guidance_scale))
