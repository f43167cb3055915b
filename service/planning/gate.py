"""The gate: admission as one process runs it, learning from every answer and every refusal.

The margin follows the promises that were broken (`caution`), and the refused are told when to come back and
find room when they do (`returns`). Pure: time and load are arguments.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from math import inf

from ditserve.service.fleet import LoadSnapshot
from ditserve.service.planning.admission import NO_WORKER, Admission, AdmissionRequest, admit
from ditserve.service.planning.capacity import Capacity
from ditserve.service.planning.caution import Caution
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.load import worker_seconds
from ditserve.service.planning.planner import DEADLINE, Policy
from ditserve.service.planning.returns import Returns


class Gate:
    """The admission of one model. All times of one gate are of one clock."""

    def __init__(self, ladder: Ladder, policy: Policy | None = None) -> None:
        self._ladder, self._policy = ladder, policy or Policy()
        self._caution = Caution(self._policy.admission_margin)
        self._totals: tuple[int, int] | None = None  # of promises kept and broken; None: not read yet
        self.returns = Returns()

    def margin(self, now: float) -> float:
        return self._caution.queue_margin(now)

    def admit(
        self, request: AdmissionRequest, load: LoadSnapshot, *, sender: Hashable, now: float
    ) -> Admission:
        """Take a request at the best rung that keeps all deadlines, or say when to come back.

        Equal requests of one caller have an equal `sender`, by which one that comes back is known.
        """
        self._learn(load, now)
        came_back = self.returns.came_back(sender, now)
        reserved_s = 0.0 if came_back else self.returns.reserved_s(now)
        admission = admit(
            request,
            load,
            ladder=self._ladder,
            now=now,
            policy=self._policy,
            margin=self._caution.margin(now),
            queue_margin=self._caution.queue_margin(now),
            reserved_s=reserved_s,
        )
        if not came_back and admission.reason != DEADLINE:
            admission = replace(admission, offered_s=self._offered_s(request, admission, load, now))
        if admission.accepted or admission.reason == NO_WORKER or admission.retry_after_s is None:
            return admission
        told_s = self.returns.tell(sender, now, free_s=admission.retry_after_s, service_s=admission.service_s)
        return replace(admission, retry_after_s=float(told_s))

    def _offered_s(
        self, request: AdmissionRequest, admission: Admission, load: LoadSnapshot, now: float
    ) -> float:
        """Return the work of a request as asked for, in seconds of one worker.

        Where an idle worker could not do that in time, it is the work at the best rung that it could do.
        """
        margin = self._caution.margin(now)
        limit_s = (inf if request.deadline_at is None else request.deadline_at - now) / margin
        rung = request.rung
        if admission.degraded or not admission.accepted:
            below = self._ladder.below(rung, request.consent) if request.allow_degraded else ()
            capacity = Capacity(load)
            for rung in (request.rung, *below):
                idle_s = capacity.time_in_every_batch(
                    rows=request.rows(self._ladder, rung),
                    steps=rung.walked,
                    samples=request.samples,
                    idle=True,
                )
                if idle_s <= limit_s:
                    break
        rows = request.rows(self._ladder, rung)
        return worker_seconds(load, rows, limit_s / rung.walked)

    def _learn(self, load: LoadSnapshot, now: float) -> None:
        """Learn how many promises of the whole fleet were kept and broken since the last snapshot."""
        totals = load.kept, load.broken
        kept, broken = (new - old for new, old in zip(totals, self._totals or totals, strict=True))
        self._totals = totals
        # Totals that fall are those of a queue that lost its data.
        if kept >= 0 <= broken and kept + broken:
            self._caution.observe(kept, broken, now)
