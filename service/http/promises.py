"""The promises of one API process: which deadlines it accepts, and what it says to the refused.

Knows no HTTP.
"""

from collections.abc import Hashable

from ditserve.service.errors import Overloaded
from ditserve.service.fleet import LoadSnapshot
from ditserve.service.planning.admission import NO_WORKER, Admission, AdmissionRequest
from ditserve.service.planning.gate import Gate
from ditserve.service.planning.ladder import Ladder
from ditserve.service.telemetry import metrics


class Promises:
    """The promises for one model."""

    def __init__(self, model: str, ladder: Ladder) -> None:
        self.gate = Gate(ladder)
        self._margin = metrics.ADMISSION_MARGIN.labels(model)
        self._offered = metrics.OFFERED.labels(model)

    def admit(
        self, request: AdmissionRequest, load: LoadSnapshot, *, sender: Hashable, now: float
    ) -> Admission:
        """Return how a request is admitted. Raises `Overloaded` where its deadline cannot be kept.

        Equal requests of one caller have an equal `sender`, by which one that comes back is known.
        """
        admission = self.gate.admit(request, load, sender=sender, now=now)
        self._margin.set(self.gate.margin(now))
        self._offered.inc(admission.offered_s)
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
