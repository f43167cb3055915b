"""Jobs that change hands: given back by a worker that leaves, with what is done of them, and gone on with by the next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from ditserve.service.engine.samples import Finished
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import QueueUnavailable
from ditserve.service.jobs import Claim
from ditserve.service.queue.broker import Broker
from ditserve.service.worker import checkpoints
from ditserve.service.worker.assembly import RunningJob
from ditserve.service.worker.checkpoints import Standing
from ditserve.service.worker.driver import Driver

log = structlog.get_logger()


class Handover:
    """`origin`: of the checkpoints that are left and gone on from. `export_s`: for the engine to say where its samples stand."""

    def __init__(self, broker: Broker, driver: Driver, *, origin: str, export_s: float) -> None:
        self._broker, self._driver = broker, driver
        self._origin, self._export_s = origin, export_s

    def standings(self, claim: Claim) -> Sequence[Standing]:
        """Where an earlier worker left the samples of a job, in seed order."""
        anew = [None] * len(claim.job.seeds)
        if not claim.checkpoint:
            return anew
        try:
            return checkpoints.read(claim.checkpoint, origin=self._origin, samples=len(anew))
        except ValueError as error:
            log.info("checkpoint dropped", job=claim.job.id, reason=str(error))
            return anew

    async def export(self, jobs: Sequence[RunningJob]) -> dict[str, Snapshot]:
        """Where the samples of jobs stand, if the engine says so in time; else they start anew."""
        ids = [request.id for job in jobs for request in job.requests]
        if not ids:
            return {}
        try:
            async with asyncio.timeout(self._export_s):
                return await asyncio.wrap_future(self._driver.export(ids))
        except TimeoutError:
            log.warning("the engine does not say where its samples stand", samples=len(ids))
            return {}

    async def give_back(self, job: RunningJob, standings: Sequence[Standing]) -> None:
        checkpoint = checkpoints.write(standings, origin=self._origin)
        taken = [each.taken if each else 0 for each in standings if not isinstance(each, Finished)]
        step = min(taken, default=job.job.steps)
        try:
            await self._broker.hand_back(job.lease, checkpoint=checkpoint, step=step)
        except QueueUnavailable:
            log.warning("not handed back", job=job.id)
