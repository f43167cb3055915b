"""Whether a cut was needed: the same arrivals served without cuts, in the order of deadlines, as if that were known to suffice.

On one machine whose speed does not depend on whom it serves, the preemptive order of deadlines meets all of them whenever any
schedule does, even one that knows the future (Dertouzos, IFIP 1974). So a busy period in which it misses one cannot be
survived at full quality, and a cut in a period in which it misses none was in vain. A curve of batches bends this a little: a batch
that is not full runs fewer rows a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditserve.bench.arrivals import Traffic
from ditserve.bench.fleet import Arm, Fleet, Sample, Site

UNCUT = Arm("uncut", admission=False, degrade=False, laxity=False, plan=False, expire=False, holds=10**9)
PLANNED = Arm("planned every step")


@dataclass(frozen=True, slots=True)
class Need:
    """Shares of all requests: late if nobody is cut, cut, cut in vain, in time with the cuts."""

    machine: str
    load: float
    late: float
    cut: float
    vain: float
    kept: float

    @classmethod
    def of(cls, machine: str, load: float, shares: Sequence[tuple[float, float, float, float]]) -> Need:
        late, cut, vain, kept = np.mean(shares, axis=0).tolist()
        return cls(machine, load, late, cut, vain, kept)


def need(site: Site, load: float, n: int, seed: int) -> tuple[float, float, float, float]:
    """(late, cut, vain, kept) of `n` requests at `load`."""
    traffic = Traffic()
    arrivals = traffic.draw(n, load * site.curve.peak * site.workers / traffic.mean_steps, seed)
    uncut = Fleet(UNCUT, site, seed=seed).run(arrivals)
    planned = Fleet(PLANNED, site, seed=seed).run(arrivals)
    period = _periods(uncut)
    lost = {period[sample.id] for sample in uncut if not sample.kept}
    cut = [sample for sample in planned if sample.finished is not None and sample.steps < sample.asked.steps]
    vain = [sample for sample in cut if period[sample.id] not in lost]
    late = sum(not sample.kept for sample in uncut)
    return late / n, len(cut) / n, len(vain) / n, sum(sample.kept for sample in planned) / n


def _periods(samples: Sequence[Sample]) -> dict[str, int]:
    """Sample → the busy period it came in: the machine has been at work since that began."""
    period, busy_until = -1, -np.inf
    found: dict[str, int] = {}
    for sample in samples:
        period += sample.arrived >= busy_until
        busy_until = max(busy_until, sample.finished or sample.arrived)
        found[sample.id] = period
    return found
