"""A claimed job while it runs: its samples go out as requests, their images come back and make up the result.

Two owners of state: `RunningJob`, and `RunningJobs` of all that a worker runs. Pure: no I/O, no clock; times
are seconds and come in as arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

from ditserve.model.spec.class_names import class_reference
from ditserve.model.spec.grids import is_explicit
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.source import SourceLatent
from ditserve.service.engine.samples import Finished, Latent, SampleRequest
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.jobs import WEIGHTS, Claim, ConditionTerm, Image, Job, JobResult
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung

# The state of one sample: under way, finished (its image may still be missing), or not begun.
SampleState = Snapshot | Finished | None


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The image of one sample, and the milliseconds that decoding and encoding it took."""

    finished: Finished
    image: Image
    decode_ms: float
    encode_ms: float


class RunningJob:
    """A claimed job: its requests, which of them are finished, and the images made so far.

    A sample id holds the attempt, so that a sample that an earlier attempt left in the engine is not taken
    for one of this attempt.

    Args:
        states: the state of each sample as an earlier worker left it, in seed order. `starts` are the samples
        to run
            from there, `done` those that are finished and lack only their image.
    """

    def __init__(
        self, claim: Claim, ladder: Ladder, *, claimed_at: float, states: Sequence[SampleState]
    ) -> None:
        self.job, self.lease, self.run_isolated = claim.job, claim.lease, claim.run_isolated
        self.claimed_at = claimed_at
        self.joined = False  # its samples are in the engine, or were
        self._states = states
        self.requests = _requests(self.job, ladder, attempt=claim.lease.attempt)
        pairs = list(zip(self.requests, states, strict=True))
        self.starts = [(request, state) for request, state in pairs if not isinstance(state, Finished)]
        self.done = [replace(state, id=request.id) for request, state in pairs if isinstance(state, Finished)]
        # The last progress that clients were told, as `step` returns it.
        self.published = (0, 1)
        self._finished: dict[str, Finished] = {}  # with or without their image
        self._images: dict[str, EncodedImage] = {}
        self._denoised_at = 0.0  # its last sample

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def missing(self) -> int:
        """Return how many images are still to be made."""
        return len(self.requests) - len(self._images)

    @property
    def rows(self) -> int:
        """Return the rows that its missing images would take of one batch, by their tokens."""
        guided = self.job.guidance_scale != 1.0
        cost = self.job.row_cost or max(1, self.job.windows)
        return ceil(cost * self.missing * (self.job.composed + guided))

    def index(self, sample_id: str) -> int:
        """Return which of the job's images a sample is, from 0."""
        return next(k for k, request in enumerate(self.requests) if request.id == sample_id)

    def join(self, source: SourceLatent[Latent] | None = None) -> list[tuple[SampleRequest, Snapshot | None]]:
        """Return the samples that join the engine now; `source` is the picture that they start from."""
        self.joined = True
        return [(replace(request, source=source), state) for request, state in self.starts]

    def finish(self, finished: Finished, *, at: float) -> None:
        """Note that a sample is denoised since `at`; its image is still to be made."""
        self._finished[finished.id] = finished
        self._denoised_at = max(self._denoised_at, at)

    def sample_states(self, snapshots: Mapping[str, Snapshot]) -> list[SampleState]:
        """Return the state of each sample, in seed order. `snapshots` are of the samples in the engine."""
        if not self.joined:
            return list(self._states)
        return [self._finished.get(request.id) or snapshots.get(request.id) for request in self.requests]

    def add(self, image: EncodedImage) -> bool:
        """Take in an image. Return True if it was the last one missing."""
        self._images[image.finished.id] = image
        return not self.missing

    def step(self, progress: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """Return how far the job is, as (steps taken, steps in all); (0, 0) if no sample is in the engine.

        It is the mean of its samples, in steps of the one furthest behind: the job moves while any of its
        samples does. Example: of three samples one is finished, one at step 10 of 20, and one has not begun;
        the job is at step 10 of 20.
        """
        running = [progress[request.id] for request in self.requests if request.id in progress]
        if not running:
            return 0, 0
        if len(self.requests) == 1:
            # Most jobs are, and a report asks for all that run.
            return running[0]
        _, steps = min(running, key=lambda sample: sample[0] / sample[1])
        finished = sum(request.id in self._finished for request in self.requests)
        done = finished + sum(Fraction(*sample) for sample in running)
        return int(steps * done / len(self.requests)), steps

    def result(self, worker: str, *, bundle: str = "") -> JobResult:
        """Return the result: all images in seed order, drawn by `worker` with a bundle of this digest.

        Steps and rung are those of the sample that was degraded most. A time is the longest of any sample,
        except for the time in the queue, which ends with the first step of any.
        """
        images = [self._images[request.id] for request in self.requests]
        samples = [image.finished for image in images]
        least = min(samples, key=lambda sample: (not sample.degraded, sample.steps_used))
        waited_ms = max(0.0, 1e3 * (self.claimed_at - self.job.created_at))
        return JobResult(
            images=tuple(image.image for image in images),
            steps_requested=self.job.steps,
            steps_used=least.steps_used,
            solver=least.rung.solver,
            rung=least.rung.name,
            degraded=least.degraded,
            reason=least.reason,
            timings_ms={
                "queue": waited_ms + min(sample.queue_ms for sample in samples),
                "denoise": max(sample.denoise_ms for sample in samples),
                "decode": max(image.decode_ms for image in images),
                "encode": max(image.encode_ms for image in images),
            },
            attempt=self.lease.attempt,
            worker=worker,
            backbones=least.rung.backbones,
            denoised_at=self._denoised_at,
            bundle=bundle,
        )


class RunningJobs:
    """The jobs that a worker runs, and which of their samples are in the engine."""

    def __init__(self) -> None:
        self._jobs: dict[str, RunningJob] = {}  # by job id
        self._in_engine: dict[str, RunningJob] = {}  # by sample id

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[RunningJob]:
        """Iterate over the jobs of this moment: they may be removed meanwhile."""
        return iter(tuple(self._jobs.values()))

    def __contains__(self, job: RunningJob) -> bool:
        """Return whether this attempt of the job still runs: it was not removed, nor claimed anew."""
        return self._jobs.get(job.id) is job

    @property
    def samples_in_engine(self) -> int:
        """The samples in the engine, without those whose picture is still encoded."""
        return sum(job.joined for job in self._in_engine.values())

    def add(self, job: RunningJob) -> None:
        """Add a job, whose `starts` are for the engine from now on."""
        self._jobs[job.id] = job
        self._in_engine.update((request.id, job) for request, _ in job.starts)

    def remove(self, job: RunningJob) -> list[str]:
        """Remove a job; return its samples that are in the engine still."""
        del self._jobs[job.id]
        return [request.id for request in job.requests if self._in_engine.pop(request.id, None)]

    def get(self, job_id: str) -> RunningJob | None:
        return self._jobs.get(job_id)

    def of_sample(self, sample_id: str) -> RunningJob | None:
        """Return the job of a sample in the engine; None if the sample or its job has left."""
        return self._in_engine.get(sample_id)

    def leave_engine(self, sample_id: str) -> RunningJob | None:
        """Note that a sample has left the engine; return its job, or None if that was removed before."""
        return self._in_engine.pop(sample_id, None)

    def has_begun(self, job: RunningJob, progress: Mapping[str, tuple[int, int]]) -> bool:
        """Return whether the engine has taken a step of the job, or has finished a sample of it."""
        return any(
            request.id not in self._in_engine or progress.get(request.id, (0, 0))[0]
            for request in job.requests
        )

    def not_joined(self, progress: Mapping[str, tuple[int, int]]) -> list[RunningJob]:
        """Return the jobs of which the engine had no sample yet when it reported `progress`."""
        return [
            job
            for job in self
            if all(request.id in self._in_engine and request.id not in progress for request in job.requests)
        ]


def describe(
    job: Job, finished: Finished, seed: int, factors: Sequence[Factor], *, unguided_scale: float = 1.0
) -> dict[str, str]:
    """Return the metadata of an image file: enough to draw the image again.

    Its guidance scale is as a request says it, which counts from `unguided_scale`.

    Nothing in it tells one run of a request from another, so that equal requests give equal files.
    """
    terms = [_term_fields(term, factors) for term in job.condition]
    rung = finished.rung
    # In JSON no character of a user's text disturbs the file.
    subtracted = json.dumps(job.negative_prompt, ensure_ascii=False) if job.negative_prompt else None
    adapters = [{"name": adapter.name, "scale": adapter.scale} for adapter in job.adapters]
    facts: dict[str, Any] = {
        "model": job.model,
        "condition": json.dumps(terms if len(terms) > 1 else terms[0], ensure_ascii=False),
        **({"mix": job.mix} if len(terms) > 1 else {}),
        "seed": seed,
        **({"frames": finished.latent.shape[1]} if finished.latent.ndim > 3 else {}),
        **({"fps": job.fps} if job.fps else {}),
        **_steps(finished, job),
        "sampler": rung.solver,
        **({"noise_levels": f"[{rung.grid}]"} if is_explicit(rung.grid) else {"grid": rung.grid}),
        "guidance_scale": round(job.guidance_scale + (unguided_scale - 1.0), 9),
        "guidance_interval": list(rung.guidance_interval),
        **({"guidance_decay": rung.guidance_decay} if rung.guidance_decay else {}),
        **({"backbones": ", ".join(rung.backbones)} if rung.backbones else {}),
        **({"negative_prompt": subtracted} if subtracted else {}),
        **({} if job.guidance_embedded is None else {"guidance_embedded": job.guidance_embedded}),
        **({"windows": job.windows} if job.windows else {}),
        **({"adapters": json.dumps(adapters)} if adapters else {}),
    }
    return {name: str(value) for name, value in facts.items()}


def _steps(finished: Finished, job: Job) -> dict[str, Any]:
    """Return the steps of an image as a request says them: of one from a picture, before its strength."""
    rung = finished.rung
    if job.source is None:
        return {"steps": finished.steps_used}
    steps = rung.steps if finished.steps_used == rung.walked else finished.steps_used
    return {"steps": steps, "strength": job.source.strength}


def _term_fields(term: ConditionTerm, factors: Sequence[Factor]) -> dict[str, Any]:
    """Return a condition as a request writes it; text and weight only where they are not the default.

    A class that was not given is null where leaving its factor out would mean the default class.
    """
    classes = {
        factor.name: None if label is None else class_reference(factor, label)
        for factor, label in zip(factors, term.labels, strict=False)
        if label is not None or factor.default is not None
    }
    text = {"text": term.text} if term.text else {}
    weight = {"weight": term.weight} if term.weight != 1.0 else {}
    return classes | text | weight


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
            consent=job.consent,
            reason=job.reason if job.rung is not None else None,
            size=job.size,
            windows=job.windows > 0,
            caller=job.caller,
            weight=WEIGHTS.get(job.priority, 1.0),
            negative_prompt=job.negative_prompt,
            guidance_embedded=job.guidance_embedded,
            adapters=job.adapters,
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
    below = ladder.below(requested, job.consent) if job.rung is not None else ()
    return requested, next((rung for rung in below if rung.name == job.rung), requested)
