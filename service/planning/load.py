"""Load figures for people and autoscalers: how many workers are wanted, who hangs, when a job will be done.

An autoscaler counts in workers, so that what it wants does not depend on how many there are: a worker that
still starts, or one too many, changes nothing. Pure: arithmetic over a load snapshot, no I/O, no clock.
"""

from dataclasses import replace
from math import inf, isfinite

from ditserve.service.fleet import LoadSnapshot
from ditserve.service.jobs import JobStatus
from ditserve.service.planning.capacity import drain_time, fleet_rows_per_s
from ditserve.service.planning.demand import demand_of

# What is due sooner, a worker that is added now cannot help with. Work without a deadline is due then.
HORIZON_S = 60.0
# The work of a request where no worker has told how fast it is.
UNKNOWN_S = 1.0


def worker_seconds(load: LoadSnapshot, rows: int, pass_s: float = inf) -> float:
    """Return the seconds that `rows` take one worker, an average one, in passes of up to `pass_s` seconds.

    Example: passes take 20 ms and 5 ms a row. 50 steps of two rows that are due in 4 s leave 80 ms a pass,
    which is enough for 12 rows, so a worker does 150 rows a second. The 100 rows are 0.67 s of its time; 3
    such requests a second want 2 workers.
    """
    if not load.workers:
        return UNKNOWN_S
    return rows * len(load.workers) / fleet_rows_per_s(load, pass_s)


def backlog_workers(load: LoadSnapshot) -> float:
    """Return how many workers would finish by its deadlines all that was accepted.

    They are the most that are wanted up to any deadline. The queue is taken to be as patient as the claimed
    work. Without workers any waiting job gives 1, so that a fleet scaled to zero is woken.

    Example: a worker does 10 rows a second. It holds 600 rows without a deadline, which are due in 60 s: one
    worker. With 600 rows more that are due in 100 s there are 1200 rows for 1000 that a worker does by then:
    1.2 workers.
    """
    if not load.workers:
        return float(load.queued_jobs > 0)
    buckets = [bucket for worker in load.workers for bucket in demand_of(worker)]
    claimed = sum(bucket.rows for bucket in buckets)
    due = [(load.taken_at + HORIZON_S, load.queued_rows)] if not claimed else []
    for bucket in buckets:
        at = load.taken_at if bucket.at == inf else bucket.at
        due.append((max(at, load.taken_at + HORIZON_S), bucket.rows))
    stretch = 1.0 + load.queued_rows / claimed if claimed else 1.0
    rows = most = 0.0
    for at, bucket_rows in sorted(due):
        rows += bucket_rows * stretch
        most = max(most, rows / (at - load.taken_at))
    return most * worker_seconds(load, 1)


def networks(load: LoadSnapshot) -> int:
    """Return with how many networks, by backend and precision, the workers of one bundle compute.

    It is the most of any bundle: two versions that are served side by side may differ.
    """
    by_bundle: dict[str, set[tuple[str, str]]] = {}
    for worker in load.workers:
        network = worker.network.backend, worker.network.precision
        by_bundle.setdefault(worker.bundle, set()).add(network)
    return max(map(len, by_bundle.values()), default=0)


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
