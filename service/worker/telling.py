"""What a worker tells about running jobs: steps, previews, degradations. A courtesy, so it is bounded and never waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from ditserve.service.engine.samples import Preview
from ditserve.service.errors import QueueUnavailable
from ditserve.service.images import CONTENT_TYPES
from ditserve.service.jobs import Lease
from ditserve.service.planning.planner import Change
from ditserve.service.queue.broker import Broker
from ditserve.service.worker.assembly import RunningJob

WAITING = 1024  # events beyond these are dropped


class Telling:
    """Sends events in order, one at a time; `run` does the sending.

    Args:
        step_event_s: step events of a job come no closer than this.
    """

    def __init__(self, broker: Broker, *, step_event_s: float) -> None:
        self._broker = broker
        self._step_event_s = step_event_s
        self._stepped_at = 0.0
        self._events: asyncio.Queue[tuple[Lease, str, dict[str, Any]]] = asyncio.Queue(WAITING)

    def tell(self, job: RunningJob, kind: str, data: dict[str, Any]) -> None:
        if not self._events.full():
            self._events.put_nowait((job.lease, kind, data))

    def degraded(self, job: RunningJob, change: Change) -> None:
        place = {"sample": job.index(change.sample_id)}
        self.tell(job, "degraded", {"rung": change.rung.name, "reason": change.reason, **place})

    def preview(self, job: RunningJob, preview: Preview, image: bytes) -> None:
        place = {"sample": job.index(preview.id), "step": preview.step, "steps": preview.steps}
        kind = CONTENT_TYPES[job.job.format]
        self.tell(job, "preview", {**place, "image": image, "content_type": kind})

    def steps(self, jobs: Iterable[RunningJob], progress: Mapping[str, tuple[int, int]], now: float) -> None:
        """A step event for every job that has moved on, unless the last ones are fresh."""
        if now - self._stepped_at < self._step_event_s:
            return
        self._stepped_at = now
        for job in jobs:
            step = job.step(progress)
            if step[0] > job.step_shown[0]:
                job.step_shown = step
                self.tell(job, "step", {"step": step[0], "steps": step[1]})

    async def run(self) -> None:
        while True:
            lease, kind, data = await self._events.get()
            try:
                await self._broker.progress(lease, kind, data)
            except QueueUnavailable:
                continue  # the job's end is what must not be lost
