"""The values that travel between the API, Redis and the workers. Pure.

Frozen dataclasses, of which those that are a `Message` travel by themselves. A field with a default was added
in a later release: a message of a release without it is read with the default, so the default says "not
known".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, Literal

from ditserve.model.spec.mixing import Combine
from ditserve.service.fleet import DemandBucket
from ditserve.service.formats import ContentType, MediaFormat
from ditserve.service.rung import Consent, Rung
from ditserve.service.source_picture import SourcePicture
from ditserve.service.wire import OLDEST, Message

Priority = Literal["low", "normal", "high"]
State = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
CallbackState = Literal["waiting", "pending", "delivered", "given-up"]
EventKind = Literal["queued", "started", "step", "preview", "degraded", "done", "failed", "cancelled"]

# The weight of a priority: the share of the queue and of the machine beside that of others.
WEIGHTS: Mapping[str, float] = {"low": 0.25, "normal": 1.0, "high": 4.0}

TERMINAL_STATES: frozenset[State] = frozenset({"done", "failed", "cancelled", "dead"})
TERMINAL_EVENTS: frozenset[EventKind] = frozenset({"done", "failed", "cancelled"})

# In place of the flow of a job that a worker should look for, whatever it holds.
ANY_FLOW: Final = ""


@dataclass(frozen=True, slots=True)
class ConditionTerm:
    """One condition of several, or the only one.

    `labels` holds a class index per factor of the bundle, in the bundle's order; None is the null class. The
    `text` "" is no text.
    """

    labels: tuple[int | None, ...]
    weight: float = 1.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A low-rank adapter that a job is drawn with, of the version that was loaded when it was admitted."""

    name: str
    scale: float
    version: str


@dataclass(frozen=True, slots=True)
class Job(Message):
    """An admitted request: one sample per seed. Times are seconds since the epoch, by the clock of the queue.

    `cost_rows` is the work of the whole job as admitted, in row-steps: predicted steps times the rows of
    each, in rows of the model's own size. `floor_rows` is the same at the lowest rung that the request
    consents to.
    """

    id: str
    model: str
    condition: tuple[ConditionTerm, ...]
    mix: Combine
    seeds: tuple[int, ...]
    steps: int
    solver: str
    grid: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    format: MediaFormat
    previews: int  # an x0 preview every so many steps; 0: none
    caller: str
    priority: Priority
    created_at: float
    deadline_at: float | None
    allow_degraded: bool
    min_steps: int
    rung: str | None  # name of the rung given at admission if that degraded the job; else None
    reason: str | None
    cost_rows: int
    trace: dict[str, str] = field(default_factory=dict)
    size: tuple[int, ...] | None = None  # in latent pixels, height and width last; None: the model's own
    vocabulary: str = ""  # digest of the class names that `condition` numbers; "": not known
    windows: int = 0  # of the model's own size, in which each image is denoised; 0: as a whole
    floor_rows: int = 0  # 0: not known
    requested: Rung | None = None  # the operating point it asks for; None: not known
    admitted: Rung | None = None  # the one it was admitted on, `requested` or below; None: not known
    negative_prompt: str = ""  # the text that guidance subtracts; "": none
    guidance_embedded: float | None = None  # the scale that the network is told; None: it is told none
    min_quality: float | None = None  # the largest distance of a rung that it consents to; None: any
    source: SourcePicture | None = None  # the picture that it starts from; None: it starts from noise
    adapters: tuple[AdapterUse, ...] = ()  # by name
    callback_url: str = ""  # where its sender is told how it ended; "": nowhere
    fps: float = 0.0  # the frames a second at which a clip plays; 0: it does not play
    row_cost: float = 0.0  # the tokens of a prediction, in rows of the model's own size; 0: not known

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("it has no seed")
        if self.size is not None and len(self.size) not in (2, 3):
            raise ValueError(f"its size has {len(self.size)} axes")

    @property
    def oldest_version(self) -> int:
        decays = self.requested is not None and self.requested.guidance_decay != 0.0
        combined = self.negative_prompt or self.mix in ("compose", "layers")
        new = decays or combined or self.solver == "unipc-2" or self.guidance_embedded is not None
        new = new or self.min_quality is not None or self.source is not None
        new = new or any(rung.stretches for rung in (self.requested, self.admitted) if rung)
        new = new or bool(self.adapters) or self.fps > 0 or self.format == "npz"
        return 2 if new else OLDEST

    @property
    def consent(self) -> Consent:
        """The rungs that it may be moved to, if it may be degraded at all."""
        return Consent.to(
            self.min_steps,
            self.min_quality,
            negative_prompt=self.negative_prompt,
            mix=self.mix,
            adapted=bool(self.adapters),
        )

    @property
    def composed(self) -> int:
        """Return how many conditions its outputs are composed of, each a row of a forward pass."""
        return len(self.condition) if self.mix == "compose" else 1

    @property
    def flow(self) -> str:
        """Return the name of its flow, a caller at one priority, between which queueing is fair."""
        return f"{self.priority}:{self.caller}"

    @property
    def demand(self) -> DemandBucket:
        """Return the work of the job by its deadline, which is infinite where it has none."""
        at = inf if self.deadline_at is None else self.deadline_at
        return DemandBucket(at, self.cost_rows, self.floor_rows or self.cost_rows)


@dataclass(frozen=True, slots=True)
class Image:
    """One file: an image, a clip, or a volume."""

    data: bytes
    seed: int
    content_type: ContentType


@dataclass(frozen=True, slots=True)
class JobResult(Message):
    """The answer of a finished job: its images in seed order, and how they were made.

    Its last step ended at `denoised_at`, by the queue's clock; 0: the worker does not say.
    """

    images: tuple[Image, ...]
    steps_requested: int
    steps_used: int
    solver: str
    rung: str
    degraded: bool
    reason: str | None
    timings_ms: dict[str, float]
    attempt: int
    worker: str
    backbones: tuple[str, ...] = ()  # the bundle's further ones that took part
    denoised_at: float = 0.0
    bundle: str = ""  # digest of the manifest it was drawn with; "": the worker does not say

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("it has no image")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to a job; (owner, attempt) is the fencing token.

    `version` is the schema version in which whoever queued the job reads what is written about it.
    """

    job_id: str
    owner: str
    attempt: int
    version: int = OLDEST


@dataclass(frozen=True, slots=True)
class Claim:
    """A job handed to a worker.

    `run_isolated`: the job is a poison candidate, because a worker crashed while it ran, so nothing may run
    beside it. `checkpoint`: what a worker that left had done of the job, as that worker wrote it; empty:
    nothing.
    """

    job: Job
    lease: Lease
    run_isolated: bool
    checkpoint: bytes = b""


@dataclass(frozen=True, slots=True)
class Renewal:
    """The outcome of renewing leases: the jobs no longer held, and those among them that were cancelled."""

    lost: frozenset[str]
    cancelled: frozenset[str]


@dataclass(frozen=True, slots=True)
class CallbackStatus:
    """The state of a job's callback: how many tries there were, and the fault of the last one ("": none)."""

    state: CallbackState
    attempts: int
    fault: str


@dataclass(frozen=True, slots=True)
class DueCallback:
    """A callback that this process is to make: the fencing token is its number among those of the job.

    Its `number` is 0 where the job's record is gone, so that nobody can be called any more.
    """

    job_id: str
    number: int
    ended_at: float


@dataclass(frozen=True, slots=True)
class EqualJobs:
    """The place of a job among those that make the same pictures, by their `digest`.

    `seen` is the one that was found there, and could not answer; "": none. The place is kept for `keep_s`.
    """

    digest: str
    seen: str
    keep_s: float


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The state of a job. `position` counts the jobs queued ahead of it and is None unless it is queued.

    A job that its own request has left, while others wait for its images, is cancelled for all who ask.
    """

    id: str
    state: State
    position: int | None
    attempt: int
    step: int
    steps: int
    created_at: float
    error: dict[str, Any] | None
    job: Job
    callback: CallbackStatus | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """An event that the holder of a lease appends to the stream of its job."""

    lease: Lease
    kind: EventKind
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One entry of a job's event stream.

    Reading after `id` resumes the stream. `data` may hold bytes (a preview's image).
    """

    id: str
    kind: EventKind
    data: dict[str, Any]

    @property
    def terminal(self) -> bool:
        return self.kind in TERMINAL_EVENTS
