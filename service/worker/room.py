"""The room of a worker: how much of whose work it claims next. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ditserve.service.jobs import ANY_FLOW
from ditserve.service.worker.running_job import RunningJob

RESERVED_SAMPLES: Final = 16  # places beyond the look-ahead, for flows of which a worker holds few samples
FEW_SAMPLES: Final = 4  # from so many on, a flow has no more of them


@dataclass(frozen=True, slots=True)
class Room:
    """The samples that a worker may claim: `samples` of any flow, then `reserved` of those not `crowded`."""

    samples: int = 0
    reserved: int = 0
    crowded: frozenset[str] = frozenset()

    def may_take(self, flows: frozenset[str]) -> bool:
        """Return whether a claim may find anything, once jobs of `flows` became available and no others.

        Example: a worker without room for samples holds many of flow A. It need not look for another job of
        flow A, but for one of flow B, which may have a reserved place.
        """
        return self.samples > 0 or ANY_FLOW in flows or not flows <= self.crowded


def wanted_rows(
    saturation_rows: int, *, lookahead_rows: int, peers: int, ahead_s: float, balance_s: float
) -> int:
    """Return the rows that a worker wants to hold: an efficient batch, and a look-ahead.

    The look-ahead is the worker's share of `lookahead_rows`, and no less than another batch: of what it does
    not see it cannot cut the steps in time. What is claimed does not move. So a worker whose work takes
    `ahead_s` seconds more than that of the idlest of its `peers`, and that is more than `balance_s`, claims
    nothing ahead; nor does one without `lookahead_rows`.

    Example: 64 workers share 64 rows. One with efficient batches of 16 rows wants 16 + 16, not 16 + 1.
    """
    if not lookahead_rows or ahead_s > balance_s:
        return saturation_rows
    return saturation_rows + max(saturation_rows, lookahead_rows // peers)


def claim_room(jobs: Iterable[RunningJob], *, wanted_rows: int, free_slots: int) -> Room:
    """Return the room of a worker that holds `jobs`.

    All flows share `wanted_rows`, an efficient batch and a look-ahead; those of which the worker holds few
    samples also have reserved places. However full it is of the work of some, a newcomer finds one.

    Example: 80 rows are wanted. The worker holds 40 samples of one flow, of 2 rows each, and a job of 2
    samples of another. The 80 rows are taken. 16 - 2 = 14 places are left for others than the first flow.
    """
    samples, rows = Counter[str](), Counter[str]()
    for job in jobs:
        if job.run_isolated:
            return Room()
        samples[job.job.flow] += job.missing
        rows[job.job.flow] += job.rows
    crowded = frozenset(flow for flow, count in samples.items() if count >= FEW_SAMPLES)
    few = samples.total() - sum(samples[flow] for flow in crowded)
    few_rows = rows.total() - sum(rows[flow] for flow in crowded)
    reserve_rows = few_rows * min(few, RESERVED_SAMPLES) // max(1, few)
    missing_rows = wanted_rows - (rows.total() - reserve_rows)
    return Room(
        samples=max(0, min(free_slots, (missing_rows + 1) // 2)),
        reserved=max(0, min(free_slots, RESERVED_SAMPLES - few)),
        crowded=crowded,
    )
