"""Warm-up: run the network at growing batch sizes, so that the cost model starts from measurements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ditserve.service.engine.forward import ForwardPass
from ditserve.service.engine.groups import Group, Groups
from ditserve.service.engine.resident import ResidentPass
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.planning.costs import FIRST_PASSES, Waits


def warm_up(
    forward: ForwardPass | ResidentPass,
    groups: Groups,
    group: Group,
    scheduler: Scheduler,
    *,
    clock: Callable[[], float],
    every_bucket: bool,
    budget_s: float,
) -> None:
    """Run batch sizes of a group, 1, 2, 4, … up to the scheduler's cap, and observe the passes.

    Every size runs twice in the first round, because the first pass of a size does not count. The sizes stop
    where the next would exceed `budget_s` seconds. With `every_bucket` every size that the backend has runs,
    whatever the time, because the first run of a bucket does work that no sample should wait for. Further
    rounds run while there is time left, because the cost model believes the fastest of the first passes of a
    size: a neighbour that stalls one of them would otherwise spoil it. The machine is as slow at first as the
    passes waited for a processor.

    Raises:
        MemoryError: not even the smallest batch fits.
    """
    began = clock()
    network_s = waited_s = 0.0

    def run(rows: int) -> float:
        """Return the seconds of a pass."""
        nonlocal network_s, waited_s
        x = np.zeros((rows, *group.pool.shape), np.float32)
        forward.run_blank(x)
        waits = Waits(forward.waited_s)
        device_s = None if group.resident is None else forward.network_s
        groups.observe(group, rows, forward.network_s, waits=waits, device_s=device_s)
        network_s, waited_s = network_s + forward.network_s, waited_s + forward.waited_s
        return forward.network_s

    sizes: list[int] = []
    rows = 1
    while rows <= scheduler.max_rows:
        rows = scheduler.size(rows)
        try:
            run(rows)
            seconds = run(rows)
        except MemoryError:
            if not scheduler.shrink(rows):
                raise
            break
        sizes.append(rows)
        if every_bucket:
            rows += 1
            continue
        # The next size has twice the rows and runs twice.
        if clock() - began + 4 * seconds > budget_s:
            break
        rows *= 2
    for _ in range(FIRST_PASSES - 1):
        for rows in sizes:
            if clock() - began <= budget_s:
                run(rows)
    if network_s > waited_s:
        group.costs.begin_at(1.0 - waited_s / network_s)
