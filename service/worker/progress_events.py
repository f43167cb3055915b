"""Progress events of running jobs: steps, previews, degradations.

They are a courtesy to the clients that watch, so their number is bounded and no work ever waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from ditserve.service.engine.samples import Preview
from ditserve.service.errors import QueueUnavailable
from ditserve.service.formats import CONTENT_TYPES, preview_format
from ditserve.service.jobs import EventKind, Progress
from ditserve.service.planning.planner import Change
from ditserve.service.queue.broker import Broker
from ditserve.service.worker.running_job import RunningJob

WAITING = 1024  # events beyond these are dropped
AT_ONCE = 32  # events of one exchange with Redis: previews among them hold images


class ProgressEvents:
    """The queue of events to publish. `run` publishes them in order, all that wait at once.

    Steps come for all running jobs together: an exchange with Redis for each would cost more than the events.

    Args:
        step_event_s: the least seconds between two step events of a job.
    """

    def __init__(self, broker: Broker, *, step_event_s: float) -> None:
        self._broker = broker
        self._step_event_s = step_event_s
        self._stepped_at = 0.0
        self._events: asyncio.Queue[Progress] = asyncio.Queue(WAITING)

    def degraded(self, job: RunningJob, change: Change) -> None:
        data = {
            "rung": change.rung.name,
            "reason": change.reason,
            "sample": job.index(change.sample_id),
        }
        self._publish(job, "degraded", data)

    def preview(self, job: RunningJob, preview: Preview, image: bytes) -> None:
        data = {
            "sample": job.index(preview.id),
            "step": preview.step,
            "steps": preview.steps,
            "image": image,
            "content_type": CONTENT_TYPES[preview_format(job.job.format)],
        }
        self._publish(job, "preview", data)

    def steps(self, jobs: Iterable[RunningJob], progress: Mapping[str, tuple[int, int]], now: float) -> None:
        """Publish a step event for every job that has advanced, unless the last ones are too recent.

        A job whose samples were given more steps is silent until it is further than clients were told.
        """
        if now - self._stepped_at < self._step_event_s:
            return
        self._stepped_at = now
        for job in jobs:
            step, steps = job.step(progress)
            told_step, told_steps = job.published
            if step > told_step and step * told_steps >= told_step * steps:
                job.published = step, steps
                self._publish(job, "step", {"step": step, "steps": steps})

    async def run(self) -> None:
        while True:
            events = [await self._events.get()]
            while len(events) < AT_ONCE and not self._events.empty():
                events.append(self._events.get_nowait())
            try:
                await self._broker.progress(*events)
            except QueueUnavailable:
                # These events are lost. The end of a job is published elsewhere, until it succeeds.
                continue

    def _publish(self, job: RunningJob, kind: EventKind, data: dict[str, Any]) -> None:
        if not self._events.full():
            self._events.put_nowait(Progress(job.lease, kind, data))
