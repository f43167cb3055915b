"""The promises of one API process: which deadlines it accepts, and whether they were kept.

Every answer teaches it how cautious to be, every refusal when the next should come back. Knows no HTTP.
"""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from ditserve.service.errors import DeadlineExceeded, Overloaded
from ditserve.service.jobs import Job, LoadSnapshot
from ditserve.service.planning.admission import NO_WORKER, Admission, AdmissionRequest, admit
from ditserve.service.planning.caution import Caution
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Policy
from ditserve.service.planning.returns import Returns
from ditserve.service.telemetry import metrics


class Promises:
    """The promises for one model."""

    def __init__(self, model: str, ladder: Ladder) -> None:
        self._ladder = ladder
        self._policy = Policy()
        self._caution = Caution(self._policy.admission_margin)
        self._returns = Returns()
        self._margin = metrics.ADMISSION_MARGIN.labels(model)
        self._margin.set(self._policy.admission_margin)

    def admit(
        self, request: AdmissionRequest, load: LoadSnapshot, *, sender: Hashable, now: float
    ) -> Admission:
        """Return how a request is admitted. Raises `Overloaded` where its deadline cannot be kept.

        Equal requests of one caller have an equal `sender`, by which one that comes back is known.
        """
        clock = time.monotonic()
        margin = self._caution.margin(clock)
        self._margin.set(margin)
        reserved_s = 0.0 if self._returns.came_back(sender, clock) else self._returns.reserved_s(clock)
        admission = admit(
            request,
            load,
            ladder=self._ladder,
            now=now,
            policy=self._policy,
            margin=margin,
            reserved_s=reserved_s,
        )
        if admission.accepted:
            return admission
        if admission.reason == NO_WORKER:
            raise Overloaded(
                "No worker is running, so no deadline can be kept.", retry_after=admission.retry_after_s
            )
        retry_s = None
        if admission.retry_after_s is not None:
            retry_s = self._returns.tell(
                sender, clock, free_s=admission.retry_after_s, service_s=admission.service_s
            )
        ways = "even in fewer steps" if request.allow_degraded else "and the request rules out fewer steps"
        raise Overloaded(
            f"The images would take about {admission.predicted_s:.1f} s, "
            f"too long for the deadline {'now' if retry_s else 'even on idle workers'}, {ways}.",
            retry_after=retry_s,
            extra={"predicted_s": round(admission.predicted_s, 3)},
        )

    @contextmanager
    def observed(self, job: Job) -> Iterator[None]:
        """Note whether the deadline of a new job is kept by the block that waits for it."""
        if job.deadline_at is None:
            yield
            return
        try:
            yield
        except DeadlineExceeded:
            self._observe(kept=False)
            raise
        self._observe(kept=time.time() <= job.deadline_at)

    def _observe(self, *, kept: bool) -> None:
        metrics.PROMISES.labels("kept" if kept else "broken").inc()
        self._caution.observe(kept, time.monotonic())
