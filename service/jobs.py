"""The values that travel between the API, Redis and the workers.

Frozen dataclasses and their wire form. The wire is msgpack with a schema version: plain data, so that a
reader of another release refuses what it does not know instead of guessing, and nothing is ever executed on
the way in. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import msgpack

from ditserve.service.rung import Rung

WIRE_VERSION = 1

Priority = Literal["low", "normal", "high"]
ImageFormat = Literal["png", "webp", "jpeg"]
Mix = Literal["linear", "spherical"]
State = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
EventKind = Literal["queued", "started", "step", "preview", "degraded", "done", "failed", "cancelled"]

TERMINAL_STATES: frozenset[State] = frozenset({"done", "failed", "cancelled", "dead"})
TERMINAL_EVENTS: frozenset[EventKind] = frozenset({"done", "failed", "cancelled"})


class WireError(ValueError):
    """Bytes that are not a message of this schema version."""


@dataclass(frozen=True, slots=True)
class ConditionTerm:
    """One condition of a mix: a class index per factor of the bundle, in its order, and a text; None is the null class, "" no text."""

    labels: tuple[int | None, ...]
    weight: float = 1.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """An admitted request. One sample per seed; times are seconds since the epoch."""

    id: str
    model: str
    condition: tuple[ConditionTerm, ...]
    mix: Mix
    seeds: tuple[int, ...]
    steps: int
    solver: str
    grid: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    format: ImageFormat
    previews: int  # an x0 preview every so many steps, 0 = none
    caller: str
    priority: Priority
    created_at: float
    deadline_at: float | None
    allow_degraded: bool
    min_steps: int
    rung: str | None  # name of the rung given at admission when already degraded; None = as requested
    reason: str | None
    cost_rows: int  # predicted row-steps of the whole job as admitted, in rows of the model's own size
    trace: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None  # height and width in latent pixels; None: the model's own
    vocabulary: str = ""  # digest of the class names that `condition` numbers; "": not told
    windows: int = 0  # of the model's own size, in which each image is denoised; 0: as a whole
    floor_rows: int = 0  # what `cost_rows` would be at the lowest rung it consents to; 0: not told
    requested: Rung | None = (
        None  # the operating point it asks for; None: written by a release that did not tell
    )
    admitted: Rung | None = None  # the one it was admitted on, `requested` or below it; None likewise

    @property
    def demand(self) -> DemandBucket:
        """The whole job as one bucket of demand."""
        at = inf if self.deadline_at is None else self.deadline_at
        return DemandBucket(at, self.cost_rows, self.floor_rows or self.cost_rows)

    def to_bytes(self) -> bytes:
        return pack(_fields(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Job:
        """Raises `WireError` for anything but a job of this schema version."""
        fields = unpack(data)
        try:
            terms = tuple(
                ConditionTerm(tuple(term["labels"]), term["weight"], term.get("text", ""))
                for term in fields.pop("condition")
            )
            low, high = fields.pop("guidance_interval")
            if fields.get("size") is not None:
                height, width = fields["size"]
                fields["size"] = height, width
            for name in ("requested", "admitted"):
                if fields.get(name) is not None:
                    fields[name] = Rung.from_wire(fields[name])
            return cls(
                condition=terms, guidance_interval=(low, high), seeds=tuple(fields.pop("seeds")), **fields
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"not a job: {error}") from error


@dataclass(frozen=True, slots=True)
class Image:
    """One encoded image."""

    data: bytes
    seed: int
    content_type: str


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a finished job answers: its images in seed order, and how they were made."""

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

    def to_bytes(self) -> bytes:
        return pack(_fields(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> JobResult:
        """Raises `WireError` for anything but a result of this schema version."""
        fields = unpack(data)
        try:
            return cls(images=tuple(Image(**image) for image in fields.pop("images")), **fields)
        except (KeyError, TypeError) as error:
            raise WireError(f"not a result: {error}") from error


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to a job; (owner, attempt) is the fencing token."""

    job_id: str
    owner: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A job handed to a worker. `alone`: it was in a batch that crashed, so run it by itself. `checkpoint`: what a worker
    that left had done of it, as that worker wrote it.
    """

    job: Job
    lease: Lease
    alone: bool
    checkpoint: bytes = b""


@dataclass(frozen=True, slots=True)
class Renewal:
    """What became of renewed leases: jobs no longer held, and those of them that were cancelled."""

    lost: frozenset[str]
    cancelled: frozenset[str]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Where a job stands. `position` counts the jobs queued ahead of it and is None unless it is queued."""

    id: str
    state: State
    position: int | None
    attempt: int
    step: int
    steps: int
    created_at: float
    error: dict[str, Any] | None
    job: Job


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a job's event stream; `id` resumes the stream after it. `data` may hold bytes (a preview's
    image).
    """

    id: str
    kind: EventKind
    data: dict[str, Any]

    @property
    def terminal(self) -> bool:
        return self.kind in TERMINAL_EVENTS


@dataclass(frozen=True, slots=True)
class DemandBucket:
    """Row-steps due at `at` (infinite: at no time): as planned, and at the lowest rungs their requests consent to.

    The names of the fields are those on the wire.
    """

    at: float
    rows: int
    floor_rows: int


@dataclass(frozen=True, slots=True)
class Network:
    """What runs a worker's network, in which numbers, and for which sizes: sides that are multiples of `size_multiple` latent
    pixels; None: the model's own only.
    """

    backend: str = ""
    precision: str = ""
    size_multiple: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker publishes about itself: the cost model `fixed + per_row·rows`, and how much it still has
    to do.
    """

    worker: str
    models: tuple[str, ...]
    max_rows: int
    step_fixed_s: float
    step_per_row_s: float
    decode_s: float
    running_samples: int
    backlog_rows: int
    last_step_age_s: float
    updated_at: float
    network: Network = Network()
    dues: tuple[
        DemandBucket, ...
    ] = ()  # the backlog by deadline; empty where there is none or it is not told
    bundle: str = ""  # digest of the manifest it serves
    given_rows: int = 0  # by the queue, ever: what it was given later is not in the backlog

    def to_bytes(self) -> bytes:
        return pack(_fields(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> WorkerState:
        """Raises `WireError` for anything but a worker state of this schema version."""
        fields = unpack(data)
        try:
            dues = tuple(DemandBucket(**bucket) for bucket in fields.pop("dues", ()))
            network = Network(**fields.pop("network", {}))
            return cls(models=tuple(fields.pop("models")), dues=dues, network=network, **fields)
        except (KeyError, TypeError) as error:
            raise WireError(f"not a worker state: {error}") from error


@dataclass(frozen=True, slots=True)
class Starting:
    """What a worker publishes before it can take jobs: what it is doing, such as "warming up"."""

    worker: str
    model: str
    doing: str

    def to_bytes(self) -> bytes:
        return pack(_fields(self))


def read_report(data: bytes) -> WorkerState | Starting:
    """What a worker published. Raises `WireError` for anything but a report of this schema version."""
    fields = unpack(data)
    if "doing" not in fields:
        return WorkerState.from_bytes(data)
    try:
        return Starting(**fields)
    except TypeError as error:
        raise WireError(f"not a worker's report: {error}") from error


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """What admission looks at: the queue and the workers alive, as of `taken_at`."""

    queued_jobs: int
    queued_rows: int
    oldest_age_s: float
    workers: tuple[WorkerState, ...]
    taken_at: float
    dead_jobs: int = 0  # put aside since the queue began, requeued or not
    starting: tuple[Starting, ...] = ()  # workers to come


def pack(fields: Mapping[str, Any]) -> bytes:
    """One message: the fields and the schema version."""
    packed: bytes = msgpack.packb({"v": WIRE_VERSION, **fields}, default=_fields)
    return packed


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass as a map; `dataclasses.asdict` takes ten times as long because it copies what is inside."""
    return {name: getattr(value, name) for name in value.__slots__}


def unpack(data: bytes) -> dict[str, Any]:
    """The fields of one message; raises `WireError` if it is malformed or of an unknown version."""
    try:
        fields = msgpack.unpackb(data, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"malformed message: {error}") from error
    if not isinstance(fields, dict):
        raise WireError("malformed message: not a map")
    version = fields.pop("v", None)
    if version != WIRE_VERSION:
        raise WireError(f"message of schema version {version!r}, this release reads {WIRE_VERSION}")
    return fields
