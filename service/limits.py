"""The bounds of a queue and the policy of a worker. Pure.

Where the time of a step decides how long something may take, the limit is a multiple of the predicted time,
and the setting is the least: a step of a large network on a busy processor takes minutes and is healthy.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a queue; times in seconds."""

    queue_limit: int = 1000  # jobs waiting
    queue_rows: int = 10_000_000  # predicted row-steps waiting
    patience_s: float = 60.0  # a job without a deadline is due so long after it was queued
    result_ttl_s: float = 3600.0
    record_ttl_s: float = 7200.0  # longer than results, so that "expired" can be told from "unknown"
    result_bytes: int = 256 * 2**20  # of all results stored
    checkpoint_bytes: int = 32 * 2**20  # of one job; with a larger checkpoint it starts anew
    checkpoint_ttl_s: float = 3600.0
    lease_s: float = 15.0
    max_attempts: int = 3
    max_run_s: float = 1800.0  # at least, for which a lease is renewed
    run_lengths: float = 10.0  # of the predicted time of a job, for which its lease is renewed
    report_ttl_s: float = 15.0
    agreed_ttl_s: float = 30 * 86400.0  # from when anybody asked what was agreed on
    events_kept: int = 512  # per job
    dead_kept: int = 1000
    dead_ttl_s: float = 7 * 86400.0

    def longest_run_s(self, predicted_s: float) -> float:
        """Return for how long a lease is renewed whose job is predicted to run for `predicted_s` seconds."""
        return max(self.max_run_s, self.run_lengths * predicted_s)


@dataclass(frozen=True, slots=True)
class WorkerPolicy:
    """Bounds and intervals of a worker; times in seconds."""

    max_rows: int = 64
    # Claimed beyond what can run by all workers of the queue together, and by each at least a batch; 0: none.
    lookahead_rows: int = 64
    balance_s: float = 0.5  # of work more than the idlest other worker, with which it claims none ahead
    drain_s: float = 30.0
    export_s: float = 3.0  # at least, in which the engine exports its samples when the worker leaves
    export_steps: float = 2.0  # which the end of the step under way, and so that export, may take
    hang_s: float = 60.0  # at least, without a step while samples run, after which the worker gives up
    hang_steps: float = 20.0  # in the predicted time of which there is none, before the worker gives up
    report_s: float = 0.5
    busy_report_s: float = 0.1  # while there is something new to report
    step_event_s: float = 0.25
    idle_s: float = 5.0  # after which a worker without work claims even without a notification
    retry_s: float = 0.2
    previews_pending: int = 4  # previews are dropped while so many batches wait to be decoded

    def hang_limit_s(self, step_s: float) -> float:
        """Return the seconds after which an engine hangs whose step is predicted to take `step_s` seconds.

        Example: a step of 10 s may take 200 s while a neighbour burns the processor. For one of 5 ms it is
        the least, 60 s.
        """
        return max(self.hang_s, self.hang_steps * step_s)
