"""A claimed job while it runs: its samples go out as requests, their images come back, and together they are the result.

One owner of state (`RunningJob`). Pure: no I/O, no clock; times are seconds and come in as arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditserve.model.spec.bundle import Factor
from ditserve.service.engine.samples import Finished, SampleRequest
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.jobs import Claim, ConditionTerm, Image, Job, JobResult
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung
from ditserve.service.worker.checkpoints import Standing


@dataclass(frozen=True, slots=True)
class Made:
    """One sample's image, and the milliseconds its decoding and encoding took."""

    finished: Finished
    image: Image
    decode_ms: float
    encode_ms: float


class RunningJob:
    """Sample ids hold the attempt, so that what an earlier attempt left in the engine is not taken for this one's.

    `standings` say where an earlier worker left its samples: `starts` are to be run from there, `done` are denoised already.
    """

    def __init__(
        self, claim: Claim, ladder: Ladder, *, claimed_at: float, standings: Sequence[Standing]
    ) -> None:
        self.job, self.lease, self.alone = claim.job, claim.lease, claim.run_isolated
        self.claimed_at = claimed_at
        self.requests = _requests(self.job, ladder, attempt=claim.lease.attempt)
        pairs = list(zip(self.requests, standings, strict=True))
        self.starts = [(request, each) for request, each in pairs if not isinstance(each, Finished)]
        self.done = [replace(each, id=request.id) for request, each in pairs if isinstance(each, Finished)]
        self.step_shown: tuple[int, int] = (0, 0)
        self._finished: dict[str, Finished] = {}  # with or without their image
        self._made: dict[str, Made] = {}

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def missing(self) -> int:
        """Images still to be made."""
        return len(self.requests) - len(self._made)

    @property
    def rows(self) -> int:
        """Rows its missing images want at once."""
        rows = max(1, self.job.windows) * self.missing
        return rows if self.job.guidance_scale == 1.0 else 2 * rows

    def index(self, sample_id: str) -> int:
        """Which of the job's images a sample is, from 0."""
        return next(k for k, request in enumerate(self.requests) if request.id == sample_id)

    def finish(self, finished: Finished) -> None:
        """A sample is denoised; its image is still to be made."""
        self._finished[finished.id] = finished

    def standings(self, snapshots: Mapping[str, Snapshot]) -> list[Standing]:
        """Where each of its samples stands, in seed order; `snapshots` are of those in the engine."""
        return [self._finished.get(each.id) or snapshots.get(each.id) for each in self.requests]

    def add(self, made: Made) -> bool:
        """Take in an image; True when it was the last one missing."""
        self._made[made.finished.id] = made
        return not self.missing

    def step(self, progress: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """(steps taken, steps in all) of the sample furthest behind; what is not in the engine any more is finished."""
        running = [progress[request.id] for request in self.requests if request.id in progress]
        return min(running, key=lambda pair: pair[0] / pair[1]) if running else self.step_shown

    def result(self, worker: str) -> JobResult:
        """All images in seed order. Steps and rung are those of the sample that got least; times are the longest
        of any, but for the queue's, which ends with the first step."""
        made = [self._made[request.id] for request in self.requests]
        least = min(made, key=lambda each: (not each.finished.degraded, each.finished.steps_used)).finished
        waited = max(0.0, 1e3 * (self.claimed_at - self.job.created_at))
        return JobResult(
            images=tuple(each.image for each in made),
            steps_requested=self.job.steps,
            steps_used=least.steps_used,
            solver=least.rung.solver,
            rung=least.rung.name,
            degraded=least.degraded,
            reason=least.reason,
            timings_ms={
                "queue": waited + min(each.finished.queue_ms for each in made),  # until the first step of any
                "denoise": max(each.finished.denoise_ms for each in made),
                "decode": max(each.decode_ms for each in made),
                "encode": max(each.encode_ms for each in made),
            },
            attempt=self.lease.attempt,
            worker=worker,
        )


def describe(job: Job, finished: Finished, seed: int, factors: Sequence[Factor]) -> dict[str, str]:
    """What an image file says about itself: enough to draw it again. Nothing in it tells one run of a request from another."""
    terms = [_written(term, factors) for term in job.condition]
    rung = finished.rung
    facts: dict[str, Any] = {
        "model": job.model,
        "condition": json.dumps(terms if len(terms) > 1 else terms[0], ensure_ascii=False),
        **({"mix": job.mix} if len(terms) > 1 else {}),
        "seed": seed,
        "steps": finished.steps_used,
        "sampler": rung.solver,
        "grid": rung.grid,
        "guidance_scale": job.guidance_scale,
        "guidance_interval": list(rung.guidance_interval),
        **({"windows": job.windows} if job.windows else {}),
    }
    return {name: str(value) for name, value in facts.items()}


def _written(term: ConditionTerm, factors: Sequence[Factor]) -> dict[str, Any]:
    """A condition as a request names it; a weight only where there is something to weigh."""
    named = {
        factor.name: factor.classes[label]
        for factor, label in zip(factors, term.labels, strict=False)
        if label is not None
    }
    return (
        named
        | ({"text": term.text} if term.text else {})
        | ({"weight": term.weight} if term.weight != 1.0 else {})
    )


def _requests(job: Job, ladder: Ladder, *, attempt: int) -> tuple[SampleRequest, ...]:
    requested, admitted = _rungs(job, ladder)
    return tuple(
        SampleRequest(
            id=f"{job.id}/{attempt}/{k}",
            condition=job.condition,
            mix=job.mix,
            seed=seed,
            rung=admitted,
            requested=requested,
            guidance_scale=job.guidance_scale,
            previews=job.previews,
            deadline_at=job.deadline_at,
            allow_degraded=job.allow_degraded,
            min_steps=job.min_steps,
            reason=job.reason if job.rung is not None else None,
            size=job.size,
            windows=job.windows > 0,
        )
        for k, seed in enumerate(job.seeds)
    )


def _rungs(job: Job, ladder: Ladder) -> tuple[Rung, Rung]:
    """Return the rung the job asks for and the one it was admitted on.

    A job of a release that does not send them has its rungs looked up on this bundle's ladder.
    """
    if job.requested is not None and job.admitted is not None:
        return job.requested, job.admitted
    guided = job.guidance_scale != 1.0
    requested = ladder.requested(job.solver, job.steps, job.grid, job.guidance_interval, guided)
    below = ladder.below(requested, job.min_steps) if job.rung is not None else ()
    return requested, next((rung for rung in below if rung.name == job.rung), requested)
