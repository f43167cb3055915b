"""The log of one scenario: its faults, every request, and what the audit of the jobs found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditserve.bench.chaos.clients import REFUSED, RequestOutcome

# Ends of accepted requests whose job the service no longer has.
LOST = {"job-lost", "job-not-found", "job-expired", "image-not-found"}
BROKEN = "deadline-exceeded"
# The figures of a summary that must be 0.
FAILURES = ("lost", "answered_twice", "waiting", "undocumented", "wrong_images")


@dataclass(slots=True)
class ChaosLog:
    """Everything that happened. `redis_loses`: Redis was made to lose data, and jobs with it."""

    faults: list[tuple[float, str]] = field(default_factory=list)
    outcomes: list[RequestOutcome] = field(default_factory=list)
    answered_twice: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    redis_loses: bool = False

    @property
    def accepted(self) -> list[RequestOutcome]:
        return [outcome for outcome in self.outcomes if outcome.end not in REFUSED]

    def recovery_seconds(self) -> list[float]:
        """Return, for every fault, the seconds until all requests open at that moment had their answer."""
        waits = []
        for at, _ in self.faults:
            ends = [o.ended_at for o in self.outcomes if o.asked_at < at < o.ended_at]
            waits.append(max(ends, default=at) - at)
        return waits

    def summary(self) -> dict[str, Any]:
        matches = Counter(outcome.match for outcome in self.outcomes if outcome.end == "done")
        recovery = self.recovery_seconds() or [0.0]
        percentiles = {f"p{q}": round(float(np.percentile(recovery, q)), 2) for q in (50, 90, 99)}
        lost = sum(outcome.end in LOST for outcome in self.accepted)
        due = [outcome for outcome in self.outcomes if outcome.due]
        return {
            "requests": len(self.outcomes),
            "accepted": len(self.accepted),
            "lost": 0 if self.redis_loses else lost,
            "lost_by_redis": lost if self.redis_loses else 0,
            "answered_twice": self.answered_twice,
            "waiting": sum(outcome.end == "waiting" for outcome in self.accepted),
            "undocumented": sum(outcome.undocumented for outcome in self.outcomes),
            "wrong_images": matches["wrong"],
            "promised": len(due),
            "broken": sum(outcome.end == BROKEN for outcome in due),
            "ends": dict(Counter(outcome.end for outcome in self.outcomes).most_common()),
            "images": dict(matches),
            "ways": dict(Counter(outcome.way for outcome in self.outcomes)),
            "attempts": {str(n): count for n, count in sorted(self.attempts.items())},
            "faults": dict(Counter(name for _, name in self.faults).most_common()),
            "recovery_s": {**percentiles, "max": round(max(recovery), 2)},
        }


def failed(summary: Mapping[str, Any]) -> bool:
    """Return True if the service failed its clients."""
    return any(summary[name] for name in FAILURES)
