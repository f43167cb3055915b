"""Load figures for people and autoscalers: how full the fleet is, whether it hangs, when a job will be done.

Pure: arithmetic over a load snapshot, no I/O, no clock.
"""

from dataclasses import replace
from math import isfinite

from ditserve.service.jobs import JobStatus, LoadSnapshot
from ditserve.service.planning.capacity import drain_time


def saturation(load: LoadSnapshot) -> float:
    """Return samples running and jobs waiting over the rows all workers can hold.

    Above 1 more workers would help. Without workers any waiting job gives 1, so that a fleet scaled to zero
    is woken.
    """
    room = sum(worker.max_rows for worker in load.workers)
    demand = load.queued_jobs + sum(worker.running_samples for worker in load.workers)
    return demand / room if room else float(load.queued_jobs > 0)


def hung(load: LoadSnapshot, after_s: float) -> bool:
    """Return whether samples are running and all workers that have any hang.

    A worker hangs that takes no step within `after_s` seconds, or within its own limit if that is longer.
    """
    busy = [worker for worker in load.workers if worker.running_samples > 0]
    return bool(busy) and all(worker.last_step_age_s > max(after_s, worker.hang_s) for worker in busy)


def eta_s(status: JobStatus, load: LoadSnapshot) -> float | None:
    """Return the predicted seconds until a queued or running job is done; None when nothing can be said."""
    if status.state == "queued":
        ahead = load.queued_rows * (status.position or 0) // max(load.queued_jobs, 1)
        return finite(drain_time(replace(load, queued_rows=ahead), status.job.cost_rows))
    if status.state != "running" or not load.workers:
        return None
    slowest = max(
        worker.step_fixed_s + worker.step_per_row_s * min(max(2 * worker.running_samples, 2), worker.max_rows)
        for worker in load.workers
    )
    return max(status.steps - status.step, 0) * slowest


def finite(seconds: float | None) -> float | None:
    """Return `seconds`, or None for an infinite time: JSON has no infinity."""
    return seconds if seconds is not None and isfinite(seconds) else None
