"""A sample: one image being denoised, from the request for it to what became of it.

Values, and one owner of state (`Sample`). Pure: no I/O, no clock, no backend; times are seconds and come in as
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.mixing import Mix
from ditserve.service.engine.conditions import Condition
from ditserve.service.engine.courses import Course
from ditserve.service.engine.slots import SlotPool
from ditserve.service.errors import ServiceError
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.ladder import steps_left
from ditserve.service.planning.planner import ROOM, Change, PlannedSample
from ditserve.service.rung import Rung
from ditserve.service.windows import Windows

Latent = npt.NDArray[np.float32]
Size = tuple[int, int]  # height and width in latent pixels


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One image to make. `requested` is what was asked for; `rung`, where it starts, is equal unless already degraded."""

    id: str
    condition: tuple[ConditionTerm, ...]
    mix: Mix
    seed: int
    rung: Rung
    requested: Rung
    guidance_scale: float
    previews: int  # an x0 preview every so many steps, 0 = none
    deadline_at: float | None
    allow_degraded: bool
    min_steps: int
    reason: str | None = None  # why `rung` is not `requested`, if it is not
    size: Size | None = None  # None: the bundle's own
    windows: bool = False  # denoise a larger size in overlapping windows of the bundle's own


@dataclass(frozen=True, slots=True)
class Finished:
    """A clean latent (C, H, W) and how it was made."""

    id: str
    latent: Latent
    steps_used: int
    rung: Rung
    degraded: bool
    reason: str | None
    queue_ms: float  # from joining the engine to its first step
    denoise_ms: float  # from its first step to its last


@dataclass(frozen=True, slots=True)
class Failed:
    id: str
    error: ServiceError


@dataclass(frozen=True, slots=True)
class Preview:
    """The model's estimate of the clean latent (C, H, W) after `step` of `steps` steps."""

    id: str
    step: int
    steps: int
    latent: Latent


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step brought about; `rows` is what the network computed, padding included."""

    finished: tuple[Finished, ...] = ()
    failed: tuple[Failed, ...] = ()
    previews: tuple[Preview, ...] = ()
    changes: tuple[Change, ...] = ()
    stop_reason: Literal["cap", "idle"] = "idle"  # why the batch grew no further
    rows: int = 0
    seconds: float = 0.0
    predicted_s: float = 0.0  # what the cost model expected of it


class Sample:
    """A running sample: where it stands on its course. Its latent lives at `slot` of `pool`.

    `floor` is the lowest rung it may be moved to. `windows` are those it is denoised in, None as a whole. `row_cost` is the
    tokens of predicting its latent once, in rows of the bundle's own size. Pool, slot and cost come with its place among the
    others (`groups`).
    """

    __slots__ = (
        "added_at",
        "condition",
        "course",
        "cursor",
        "degraded",
        "floor",
        "generator",
        "pool",
        "reason",
        "request",
        "row_cost",
        "rung",
        "size",
        "slot",
        "started_at",
        "taken",
        "windows",
    )

    pool: SlotPool
    slot: int
    row_cost: float

    def __init__(
        self,
        request: SampleRequest,
        condition: Condition,
        course: Course,
        *,
        added_at: float,
        size: Size,
        floor: Rung,
        windows: Windows | None = None,
    ) -> None:
        self.request, self.floor = request, floor
        self.size, self.windows = size, windows
        self.condition = condition
        self.course = course
        self.cursor = 0  # the course's next step
        self.taken = 0  # steps done, over all courses
        self.rung = request.rung
        self.reason = request.reason
        self.degraded = request.rung != request.requested
        self.generator = np.random.Generator(np.random.Philox(request.seed))
        self.added_at = added_at
        self.started_at: float | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def deadline_at(self) -> float | None:
        return self.request.deadline_at

    @property
    def rows(self) -> int:
        """Rows of the next step: two where guidance acts, else one, of each window."""
        rows = 2 if self.course.guided[self.cursor] else 1
        return rows if self.windows is None else rows * len(self.windows)

    @property
    def guided(self) -> bool:
        """Whether guidance acts on the next step."""
        return self.course.guided[self.cursor]

    @property
    def timestep(self) -> int:
        """The noise level the sample stands at: the timestep of its next step."""
        return self.course.timesteps[self.cursor]

    @property
    def remaining_steps(self) -> int:
        return len(self.course) - self.cursor

    @property
    def least_steps(self) -> int:
        """Steps left if it moved to its floor now."""
        return min(self.remaining_steps, steps_left(self.remaining_steps, self.rung, self.floor))

    @property
    def steps(self) -> int:
        """Steps in all: those taken and those left."""
        return self.taken + self.remaining_steps

    @property
    def line(self) -> npt.NDArray[np.float32]:
        """The numbers of the next step, (7,); see `courses.COLUMNS`."""
        line: npt.NDArray[np.float32] = self.course.lines[self.cursor]
        return line

    @property
    def remaining_rows(self) -> int:
        return self.course.rows_from(self.cursor)

    @property
    def previous(self) -> int | None:
        """The timestep of the estimate in the solver's history, None before the first step."""
        return self.course.timesteps[self.cursor - 1] if self.cursor else self.course.previous

    def planned(self) -> PlannedSample:
        """This sample as the planner sees it."""
        return PlannedSample(
            id=self.id,
            deadline_at=self.deadline_at,
            rung=self.rung,
            remaining_steps=self.remaining_steps,
            guided=self.course.scale != 1.0,
            floor_steps=self.request.min_steps,
            allow_degraded=self.request.allow_degraded,
            started=self.taken > 0,
            timestep=self.timestep,
            requested=self.request.requested,
            row_cost=self.row_cost,
        )

    def advance(self, started_at: float) -> None:
        """Count a step that began at `started_at`."""
        if self.started_at is None:
            self.started_at = started_at
        self.cursor += 1
        self.taken += 1

    def follow(self, change: Change, course: Course) -> None:
        """Continue on another course. A sample that has taken steps counts as degraded even if it later climbs back."""
        self.rung, self.course, self.cursor = change.rung, course, 0
        self.degraded = self.taken > 0 or change.rung != self.request.requested
        if change.reason != ROOM:
            self.reason = change.reason
        elif not self.degraded:
            self.reason = None

    def finished(self, latent: Latent, now: float) -> Finished:
        started = now if self.started_at is None else self.started_at
        return Finished(
            id=self.id,
            latent=latent,
            steps_used=self.taken,
            rung=self.rung,
            degraded=self.degraded,
            reason=self.reason,
            queue_ms=1e3 * (started - self.added_at),
            denoise_ms=1e3 * (now - started),
        )
