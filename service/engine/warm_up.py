"""Warm-up: run the network at growing batch sizes, so that the cost model starts from measurements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ditserve.service.engine.forward import ForwardPass
from ditserve.service.engine.groups import Groups
from ditserve.service.engine.scheduler import Scheduler


def warm_up(
    forward: ForwardPass,
    groups: Groups,
    scheduler: Scheduler,
    *,
    clock: Callable[[], float],
    every_bucket: bool,
    budget_s: float,
) -> None:
    """Run batch sizes twice each, 1, 2, 4, … up to the scheduler's cap, and observe the passes.

    With `every_bucket` every size that the backend has runs, whatever the time, because the first run of a
    bucket does work that no sample should wait for. Otherwise the sizes stop where the next would exceed
    `budget_s` seconds.

    Raises:
        MemoryError: not even the smallest batch fits.
    """
    group = groups.own
    began, rows = clock(), 1
    while rows <= scheduler.max_rows:
        rows = scheduler.size(rows)
        x = np.zeros((rows, *group.pool.shape), np.float32)
        try:
            for _ in range(2):
                start = clock()
                forward.run_blank(x)
                seconds = clock() - start
                groups.observe(group, rows, seconds)
        except MemoryError:
            if not scheduler.shrink(rows):
                raise
            return
        if every_bucket:
            rows += 1
            continue
        # The next size has twice the rows and runs twice.
        if clock() - began + 4 * seconds > budget_s:
            return
        rows *= 2
