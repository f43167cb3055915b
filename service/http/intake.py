"""From a request to a job in the queue: what this model understands, whether its deadline can be kept, and who is asked.

The one door for `/generate` and for OpenAI's route. Raises errors of the tree; knows no HTTP.
"""

import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import ceil

from ditserve.model.spec.bundle import Manifest
from ditserve.model.spec.diffusion import GRIDS
from ditserve.model.spec.solvers import SOLVERS
from ditserve.service.errors import IdempotencyMismatch, InternalError, InvalidRequest, Overloaded, QueueFull
from ditserve.service.http.idempotency import fingerprint_of, keyed_id
from ditserve.service.http.load_cache import LoadCache
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.http.sizes import Extent, as_a_whole, in_windows, written
from ditserve.service.identity import vocabulary_digest
from ditserve.service.jobs import TERMINAL_STATES, ConditionTerm, ImageFormat, Job, JobStatus
from ditserve.service.planning.admission import NO_WORKER, Admission, Newcomer, admit
from ditserve.service.planning.capacity import drained
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.load import finite
from ditserve.service.queue.queue_client import Queue
from ditserve.service.rung import Rung
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics
from ditserve.service.vocabulary import ClassRef, Vocabulary

_FREED = 0.1  # of a full queue should have drained before it is worth coming back
_RETRY_S = 5.0  # when that cannot be predicted
TEXT = "text"  # in a condition, what is no factor
_BODY = "body"  # in a job's trace: the fingerprint of the request, to tell a replay from a reuse of its key


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `key` is their Idempotency-Key; `at_once`, how many unfinished jobs they may have; `trace` travels with the job
    into logs and spans."""

    name: str
    key: str | None = None
    at_once: int | None = None
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A job that is in the queue. `new` is False when an Idempotency-Key led to one that was there already; `pending` while it
    has not ended."""

    job: Job
    new: bool
    pending: bool
    predicted_s: float | None


class Intake:
    """Turns requests for one model into jobs."""

    def __init__(self, manifest: Manifest, settings: Settings, queue: Queue) -> None:
        self.manifest = manifest
        self.vocabulary = Vocabulary(manifest.factors)
        self.ladder = Ladder.from_manifest(manifest)
        self.load = LoadCache(queue)
        self._digest = vocabulary_digest(manifest)
        self._settings = settings
        self._queue = queue

    async def submit(
        self, request: GenerateRequest, caller: Caller, *, image_format: ImageFormat = "png"
    ) -> Ticket:
        """Admit a request and queue it.

        Raises:
            UnknownCondition, InvalidRequest: the model cannot do what is asked.
            Overloaded, QueueFull, QueueUnavailable: not now.
            IdempotencyMismatch: the caller's key was used for another request.
        """
        condition = self._condition(request)
        rung = self._rung(request)
        extent = await self._extent(request)
        fingerprint = "" if caller.key is None else fingerprint_of(request, image_format)
        if caller.key is not None:
            known = await self._queue.status(self._keyed(caller.name, caller.key))
            if known is not None:
                return self._again(known, fingerprint)
        now = time.time()
        deadline_at = self._deadline(request, now)
        newcomer = Newcomer(
            rung=rung,
            guidance_scale=self._guidance(request),
            samples=request.n,
            deadline_at=deadline_at,
            allow_degraded=request.allow_degraded,
            min_steps=self._floor(request, rung),
            row_cost=extent.row_cost,
        )
        admission = await self._admit(newcomer, now)
        job = self._job(
            request,
            caller,
            condition,
            rung,
            admission,
            now=now,
            deadline_at=deadline_at,
            image_format=image_format,
            extent=extent,
        )
        if fingerprint:
            job.trace[_BODY] = fingerprint
        with self.load.counted(job):  # with no wait since it was weighed: who is weighed next is to see it
            new = await self._submit(job, caller)
        if not new:
            return self._again(await self._known(job), fingerprint)
        if admission.degraded:
            metrics.ADMITTED_DEGRADED.labels(admission.rung.name).inc()
        return Ticket(job, new=True, pending=True, predicted_s=finite(admission.predicted_s))

    def _keyed(self, caller: str, key: str) -> str:
        """With other classes a model is another: what was made for the old ones is not the answer."""
        return keyed_id(caller, key, f"{self.manifest.name} {self._digest}")

    def _condition(self, request: GenerateRequest) -> tuple[ConditionTerm, ...]:
        if isinstance(request.condition, dict):
            return (self._term(request.condition, 1.0),)
        return tuple(self._term(term.condition, term.weight) for term in request.condition)

    def _term(self, condition: Mapping[str, ClassRef], weight: float) -> ConditionTerm:
        """A term whose `text`, where the model takes one, is not a factor."""
        given = dict(condition)
        text = given.pop(TEXT, None) if self.manifest.config.text_size else None
        if not isinstance(text, str | None):
            raise wrong("condition", "The text must be a string.")
        return replace(self.vocabulary.term(given, weight), text=(text or "").strip())

    def _rung(self, request: GenerateRequest) -> Rung:
        defaults, timesteps = self.manifest.defaults, self.manifest.diffusion.timesteps
        solver = _one_of("sampler", request.sampler or defaults.solver, SOLVERS)
        steps = request.steps or defaults.steps
        if steps > timesteps:
            raise wrong("steps", f"This model has {timesteps} noise levels, so at most {timesteps} steps.")
        if (request.min_steps or 1) > steps:
            raise wrong("min_steps", f"It cannot be more than the {steps} steps asked for.")
        if request.n > self._settings.max_images:
            raise wrong("n", f"At most {self._settings.max_images} images a request.")
        low, high = request.guidance_interval or defaults.guidance_interval
        if low > high:
            raise wrong("guidance_interval", "Its low end is above its high end.")
        grids = {rung.solver: rung.grid for rung in reversed(self.ladder.rungs)}
        grid = _one_of("grid", request.grid or grids.get(solver, defaults.grid), GRIDS)
        return self.ladder.requested(solver, steps, grid, (low, high), self._guidance(request) != 1.0)

    def _guidance(self, request: GenerateRequest) -> float:
        given = request.guidance_scale
        return self.manifest.defaults.guidance_scale if given is None else given

    def _deadline(self, request: GenerateRequest, now: float) -> float | None:
        limit = self._settings.max_deadline_s
        if request.deadline_ms is None:
            default = self._settings.default_deadline_s
            return None if default is None else now + default
        if request.deadline_ms > limit * 1000:
            raise wrong("deadline_ms", f"At most {limit * 1000:.0f} ms.")
        return now + request.deadline_ms / 1000

    async def _extent(self, request: GenerateRequest) -> Extent:
        """What the size asked for comes to. In windows there is any; which there are besides the model's own, the workers say."""
        own, max_area = size(self.manifest), self._settings.max_area
        if request.windows:
            if request.size is None:
                raise wrong("windows", f"Name a size larger than the model's own, {own}.")
            try:
                return in_windows(request.size, self.manifest, max_area=max_area)
            except ValueError as error:
                raise wrong("size", str(error)) from None
        if request.size in (None, own):
            return Extent()
        workers = (await self.load()).workers
        if not workers:
            raise Overloaded("No worker is running to say which sizes can be made.", retry_after=_RETRY_S)
        try:
            return as_a_whole(request.size, self.manifest, workers, max_area=max_area)
        except ValueError as error:
            raise wrong("size", str(error)) from None

    async def _admit(self, newcomer: Newcomer, now: float) -> Admission:
        admission = admit(newcomer, await self.load(), ladder=self.ladder, now=now)
        if admission.accepted:
            return admission
        if admission.reason == NO_WORKER:
            raise Overloaded(
                "No worker is running, so no deadline can be kept.", retry_after=admission.retry_after_s
            )
        ways = "even in fewer steps" if newcomer.allow_degraded else "and the request rules out fewer steps"
        when = "now" if admission.retry_after_s else "even on idle workers"
        raise Overloaded(
            f"The images would take about {admission.predicted_s:.1f} s, too long for the deadline {when}, {ways}.",
            retry_after=admission.retry_after_s,
            extra={"predicted_s": round(admission.predicted_s, 3)},
        )

    def _floor(self, request: GenerateRequest, rung: Rung) -> int:
        return request.min_steps or 1 if request.allow_degraded else rung.steps

    def _job(
        self,
        request: GenerateRequest,
        caller: Caller,
        condition: tuple[ConditionTerm, ...],
        rung: Rung,
        admission: Admission,
        *,
        now: float,
        deadline_at: float | None,
        image_format: ImageFormat,
        extent: Extent,
    ) -> Job:
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        scale = self._guidance(request)
        floor = self._floor(request, rung)
        lowest = (admission.rung, *(self.ladder.below(rung, floor) if request.allow_degraded else ()))[-1]

        def cost(rung: Rung) -> int:
            return ceil(request.n * extent.row_cost * self.ladder.row_steps(rung, scale))

        return Job(
            id=secrets.token_hex(16) if caller.key is None else self._keyed(caller.name, caller.key),
            model=self.manifest.name,
            condition=condition,
            mix=request.mix,
            seeds=tuple(range(seed, seed + request.n)),
            steps=rung.steps,
            solver=rung.solver,
            grid=rung.grid,
            guidance_scale=scale,
            guidance_interval=rung.guidance_interval,
            format=image_format,
            previews=request.previews,
            caller=caller.name,
            priority=request.priority,
            created_at=now,
            deadline_at=deadline_at,
            allow_degraded=request.allow_degraded,
            min_steps=floor,
            rung=admission.rung.name if admission.degraded else None,
            reason=admission.reason,
            cost_rows=cost(admission.rung),
            floor_rows=cost(lowest),
            trace=dict(caller.trace),
            size=extent.size,
            windows=extent.windows,
            vocabulary=self._digest,
            requested=rung,
            admitted=admission.rung,
        )

    async def _submit(self, job: Job, caller: Caller) -> bool:
        try:
            return await self._queue.submit(job, at_once=caller.at_once)
        except QueueFull as error:
            wait = finite(drained(await self.load()) * _FREED)
            raise QueueFull(error.detail, retry_after=_RETRY_S if wait is None else max(1.0, wait)) from None

    async def _known(self, job: Job) -> JobStatus:
        known = await self._queue.status(job.id)
        if known is None:
            raise InternalError()
        return known

    def _again(self, known: JobStatus, fingerprint: str) -> Ticket:
        if known.job.trace.get(_BODY, "") != fingerprint:
            raise IdempotencyMismatch("This Idempotency-Key was sent before with another request.")
        return Ticket(known.job, new=False, pending=known.state not in TERMINAL_STATES, predicted_s=None)


def size(manifest: Manifest) -> str:
    """Width x height of a model's images, in pixels."""
    return written(manifest)


def wrong(field: str, detail: str) -> InvalidRequest:
    """The error of one field of the request that this model or service cannot take."""
    return InvalidRequest(
        f"{field}: {detail}", extra={"errors": [{"pointer": f"#/{field}", "detail": detail}]}
    )


def _one_of(field: str, name: str, known: Collection[str]) -> str:
    if name not in known:
        raise wrong(field, f"There is no {name!r}; choose among {', '.join(known)}.")
    return name
