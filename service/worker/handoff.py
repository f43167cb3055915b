"""Jobs that change hands: a leaving worker gives a job back with a checkpoint, the next one goes on from it.

Only a worker of the same release, bundle and backend goes on from a checkpoint, so that a seed still means an
image. Any other worker ignores it and starts the job anew.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import structlog

from ditserve.model.spec.manifest import Manifest
from ditserve.service.engine.samples import Finished
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import QueueUnavailable
from ditserve.service.jobs import Claim
from ditserve.service.queue.broker import Broker
from ditserve.service.wire import WireError, build, fields_of, pack, unpack
from ditserve.service.worker.engine_thread import EngineThread
from ditserve.service.worker.running_job import RunningJob, SampleState

VERSION = 1  # of what a checkpoint holds and what it means to the engine

log = structlog.get_logger()


class Handoff:
    """Giving jobs back to the queue, and going on with those that others gave back.

    Args:
        origin: `checkpoint_origin` of this worker.
    """

    def __init__(self, broker: Broker, engine: EngineThread, *, origin: str) -> None:
        self._broker, self._engine, self._origin = broker, engine, origin

    def sample_states(self, claim: Claim) -> Sequence[SampleState]:
        """Return the states in which an earlier worker left the samples of a job, in seed order."""
        not_begun = [None] * len(claim.job.seeds)
        if not claim.checkpoint:
            return not_begun
        try:
            return read_checkpoint(claim.checkpoint, origin=self._origin, samples=len(not_begun))
        except Exception as error:
            # Whatever a checkpoint holds, the job can still start anew.
            log.info("checkpoint dropped", job=claim.job.id, reason=str(error))
            return not_begun

    async def export(self, jobs: Sequence[RunningJob], *, limit_s: float) -> dict[str, Snapshot]:
        """Return snapshots of the jobs' samples by sample id; none if the engine does not answer in time.

        It answers when the step under way has ended.
        """
        ids = [request.id for job in jobs for request in job.requests]
        if not ids:
            return {}
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.wrap_future(self._engine.export(ids))
        except TimeoutError:
            log.warning("the engine does not say where its samples stand", samples=len(ids))
            return {}

    async def hand_back(self, job: RunningJob, states: Sequence[SampleState]) -> None:
        """Return a job to the queue, with a checkpoint of its samples."""
        checkpoint = write_checkpoint(states, origin=self._origin, version=job.lease.version)
        taken = [state.taken if state else 0 for state in states if not isinstance(state, Finished)]
        step = min(taken, default=job.job.steps)
        try:
            await self._broker.hand_back(job.lease, checkpoint=checkpoint, step=step)
        except QueueUnavailable:
            log.warning("not handed back", job=job.id)


def checkpoint_origin(manifest: Manifest, backend: str) -> str:
    """Return the name of who may go on from a checkpoint: equal for workers that make equal images."""
    facts = f"{VERSION}\0{backend}\0{manifest.model_dump_json()}"
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def write_checkpoint(states: Sequence[SampleState], *, origin: str, version: int) -> bytes:
    """Return the checkpoint of a job, its samples in seed order; empty if none of them has begun.

    `version` is that of the job, which whoever claims it reads.
    """
    if not any(states):
        return b""
    return pack({"origin": origin, "samples": [_to_wire(state) for state in states]}, version)


def read_checkpoint(data: bytes, *, origin: str, samples: int) -> tuple[SampleState, ...]:
    """Return the states that `write_checkpoint` was given.

    Raises:
        ValueError: another origin wrote it, it is of another number of samples, or it is no checkpoint at
        all.
    """
    try:
        fields = unpack(data)
        if fields["origin"] != origin:
            raise ValueError("it is of another bundle, backend or release")
        states = tuple(_from_wire(sample) for sample in fields["samples"])
    except (AttributeError, KeyError, TypeError, WireError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if len(states) != samples:
        raise ValueError(f"it has {len(states)} samples, and the job {samples}")
    return states


def _to_wire(state: SampleState) -> dict[str, Any] | None:
    if isinstance(state, Snapshot):
        return {"under_way": state.to_wire()}
    if state is None:
        return None
    latent = state.latent.astype("<f4").tobytes()
    return {"done": {**fields_of(state), "latent": latent, "shape": state.latent.shape}}


def _from_wire(data: Mapping[str, Any] | None) -> SampleState:
    if data is None:
        return None
    if "under_way" in data:
        return Snapshot.from_wire(data["under_way"])
    fields = dict(data["done"])
    latent = np.frombuffer(fields["latent"], "<f4").astype(np.float32).reshape(fields.pop("shape"))
    return build(Finished, {**fields, "latent": latent})
