"""The simulated API process: the real gate, and a view of the fleet as old as the real one's may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

from ditserve.service.fleet import LoadSnapshot
from ditserve.service.planning.admission import Admission, AdmissionRequest
from ditserve.service.planning.gate import Gate
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Policy

LOAD_FRESH_S = 0.1  # the greatest age of the load that an API process reckons with


class SimulatedApi:
    """One of several processes that admit requests.

    It learns of what the others admit when it reads the load.
    """

    def __init__(self, ladder: Ladder, policy: Policy, read_load: Callable[[float], LoadSnapshot]) -> None:
        self._gate, self._read_load = Gate(ladder, policy), read_load
        self.offered_s = 0.0  # the counter that an autoscaler watches
        self._load: LoadSnapshot | None = None
        self._read_at = -inf

    def admit(self, request: AdmissionRequest, *, sender: str, now: float) -> Admission:
        if self._load is None or now - self._read_at > LOAD_FRESH_S:
            self._load, self._read_at = self._read_load(now), now
        answer = self._gate.admit(request, self._load, sender=sender, now=now)
        self.offered_s += answer.offered_s
        if answer.accepted:
            rows = self._load.queued_rows + request.samples * answer.rung.steps
            self._load = replace(self._load, queued_rows=rows)
        return answer
