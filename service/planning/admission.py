"""Admission: whether a request is taken, at which rung, and if not when to come back.

It is decided from what the workers publish, so that a full service answers at once. Work goes in the order of
deadlines: a request waits for what is due before its own deadline, and is taken only if what is due later
still holds. Pure: time and load are arguments.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import ceil, inf

from ditserve.service.fleet import LoadSnapshot
from ditserve.service.planning.capacity import Capacity
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import DEADLINE, LOAD, Policy
from ditserve.service.rung import Consent, Rung

NO_WORKER = "no-worker"


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A request for `samples` images at `rung`, each composed of `conditions`.

    `row_cost` is the tokens of one row, in rows of the bundle's own size. `consent` matters if it
    `allow_degraded`.
    """

    rung: Rung
    guidance_scale: float
    samples: int
    deadline_at: float | None
    allow_degraded: bool
    consent: Consent
    row_cost: float = 1.0
    conditions: int = 1

    def rows(self, ladder: Ladder, rung: Rung) -> int:
        """Return the work of all images at a rung, in rows of the bundle's own size."""
        row_steps = ladder.row_steps(rung, self.guidance_scale, self.conditions)
        return ceil(self.samples * self.row_cost * row_steps)


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to a request. `predicted_s` is the time to its last image.

    `retry_after_s` is set when it is refused and coming back later would help: then there is room for it, if
    nobody else comes. It would take the whole fleet `service_s` seconds.

    `offered_s` is the work that it brings, as asked for, in seconds of one worker: 0 if it was counted when
    it was refused before, and if no number of workers would help.
    """

    accepted: bool
    rung: Rung
    degraded: bool
    reason: str | None
    retry_after_s: float | None
    predicted_s: float
    service_s: float = 0.0
    offered_s: float = 0.0


def admit(
    request: AdmissionRequest,
    load: LoadSnapshot,
    *,
    ladder: Ladder,
    now: float,
    policy: Policy | None = None,
    margin: float | None = None,
    queue_margin: float | None = None,
    reserved_s: float = 0.0,
) -> Admission:
    """Take a request at the best rung that keeps all deadlines, its own too, or say when to come back.

    `margin` replaces that of the policy where more caution is called for, and `queue_margin` is that of work
    that is done before, where that is larger. `reserved_s` seconds of the fleet are left to others.

    A request without a deadline is taken as asked: the queue's bound is its only limit.

    Example: one idle worker does 8 rows in 1.7 s, and a pass of one row takes 1 s. An image of 50 steps, a
    row each, is due in 40 s; with the margin of 1.1 it must be predicted within 36.4 s. At 50 steps it takes
    50 s. The next rung has 30 steps and takes 30 s, so it is taken there, degraded.
    """
    policy = policy or Policy()
    rung, deadline_at = request.rung, request.deadline_at
    if not load.workers:
        reason, retry_s = (None, None) if deadline_at is None else (NO_WORKER, policy.retry_s)
        return Admission(deadline_at is None, rung, False, reason, retry_s, inf)
    margin = policy.admission_margin if margin is None else margin
    due = inf if deadline_at is None else deadline_at
    outlook = _Outlook(
        request,
        ladder,
        Capacity(load, recut=policy.recut, within_s=due - now),
        now=now,
        due=due,
        margin=margin,
        queue_margin=max(margin, queue_margin or margin),
        reserved_s=reserved_s,
    )
    options = (rung, *(ladder.below(rung, request.consent) if request.allow_degraded else ()))
    lowest = options[-1]
    on_lowest = outlook.on(lowest)
    lowest_s, _ = on_lowest
    for option in options:
        # The others have more rows than the lowest: where that is too late, so is each of as many steps.
        if lowest_s <= outlook.limit_s or option.walked < lowest.walked:
            predicted_s, holds = on_lowest if option is lowest else outlook.on(option)
            if holds:
                degraded = option != rung
                return Admission(True, option, degraded, LOAD if degraded else None, None, predicted_s)
    idle_s, service_s = outlook.alone_on(lowest)
    if idle_s * policy.admission_margin > due - now:
        return Admission(False, rung, False, DEADLINE, None, lowest_s)
    retry_s = max(1.0, lowest_s - outlook.limit_s)
    return Admission(False, rung, False, LOAD, retry_s, lowest_s, service_s)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """The prospects of a request on a fleet, where work may take `margin` times as long as predicted.

    Work that is done before may take `queue_margin` times as long, and `reserved_s` are left to others.
    """

    request: AdmissionRequest
    ladder: Ladder
    fleet: Capacity
    _: KW_ONLY
    now: float
    due: float
    margin: float
    queue_margin: float
    reserved_s: float

    @property
    def limit_s(self) -> float:
        """The seconds within which the images must be predicted."""
        return (self.due - self.now) / self.margin

    def on(self, rung: Rung) -> tuple[float, bool]:
        """Return the predicted seconds on a rung, and whether all deadlines hold there."""
        rows, capacity = self._work(rung)
        shortest_s = capacity.time_in_every_batch(rows=rows, steps=rung.walked, samples=self.request.samples)
        excess = self.queue_margin / self.margin - 1.0
        ahead_s = excess * capacity.queue_drain_time(due=self.due) if excess else 0.0
        queued_s = capacity.queue_drain_time(rows, due=self.due) + ahead_s + self.reserved_s
        predicted_s = max(shortest_s, queued_s)
        broken = capacity.breaks_later_deadline(rows, self.due, now=self.now, margin=self.queue_margin)
        return predicted_s, predicted_s <= self.limit_s and not broken

    def alone_on(self, rung: Rung) -> tuple[float, float]:
        """Return the seconds of a rung on idle workers, and those that it takes the whole fleet."""
        rows, capacity = self._work(rung)
        samples = self.request.samples
        idle_s = capacity.time_in_every_batch(rows=rows, steps=rung.walked, samples=samples, idle=True)
        return idle_s, capacity.fleet_time(rows)

    def _work(self, rung: Rung) -> tuple[int, Capacity]:
        return self.request.rows(self.ladder, rung), self.fleet.in_passes_of(self.limit_s / rung.walked)
