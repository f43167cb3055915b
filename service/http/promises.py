"""The promises of one API process: which deadlines it accepts, and whether they were kept.

Every answer teaches it how cautious to be, every refusal when the next should come back. Knows no HTTP.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from ditserve.service.errors import DeadlineExceeded, Overloaded
from ditserve.service.jobs import Job, LoadSnapshot
from ditserve.service.planning.admission import NO_WORKER, Admission, AdmissionRequest
from ditserve.service.planning.gate import Gate
from ditserve.service.planning.ladder import Ladder
from ditserve.service.telemetry import metrics


class Promises:
    """The promises for one model. `clock` is that of the jobs' deadlines."""

    def __init__(self, model: str, ladder: Ladder, *, clock: Callable[[], float]) -> None:
        self.gate, self._clock = Gate(ladder), clock
        self._margin = metrics.ADMISSION_MARGIN.labels(model)

    def admit(
        self, request: AdmissionRequest, load: LoadSnapshot, *, sender: Hashable, now: float
    ) -> Admission:
        """Return how a request is admitted. Raises `Overloaded` where its deadline cannot be kept.

        Equal requests of one caller have an equal `sender`, by which one that comes back is known.
        """
        admission = self.gate.admit(request, load, sender=sender, now=now)
        self._margin.set(self.gate.margin(now))
        if admission.accepted:
            return admission
        if admission.reason == NO_WORKER:
            raise Overloaded(
                "No worker is running, so no deadline can be kept.", retry_after=admission.retry_after_s
            )
        ways = "even in fewer steps" if request.allow_degraded else "and the request rules out fewer steps"
        when = "now" if admission.retry_after_s else "even on idle workers"
        raise Overloaded(
            f"The images would take about {admission.predicted_s:.1f} s, "
            f"too long for the deadline {when}, {ways}.",
            retry_after=admission.retry_after_s,
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
            self._observe(False, self._clock())
            raise
        now = self._clock()
        self._observe(now <= job.deadline_at, now)

    def _observe(self, kept: bool, now: float) -> None:
        metrics.PROMISES.labels("kept" if kept else "broken").inc()
        self.gate.observe(kept, now)
