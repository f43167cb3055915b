"""A sample: one image being denoised, from its request to its result.

Values, and one owner of state (`Sample`). Pure: no I/O, no clock, no backend. Times are seconds and come in
as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.mixing import Combine
from ditserve.model.spec.sizes import Size
from ditserve.model.spec.source import NoisySource, SourceLatent
from ditserve.service.engine.conditions import Conditioning
from ditserve.service.engine.fair_shares import Flow
from ditserve.service.engine.geometry import Geometry
from ditserve.service.engine.trajectory import Trajectory
from ditserve.service.errors import NumericalError, ServiceError
from ditserve.service.jobs import AdapterUse, ConditionTerm
from ditserve.service.planning.ladder import steps_left
from ditserve.service.planning.planner import ROOM, Change, PlannedSample
from ditserve.service.rung import Consent, Rung

Latent = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One image to make.

    `requested` is the rung asked for. `rung` is where it starts: the same, unless it is already degraded.
    """

    id: str
    condition: tuple[ConditionTerm, ...]
    mix: Combine
    seed: int
    rung: Rung
    requested: Rung
    guidance_scale: float
    previews: int  # one x0 preview every so many steps; 0: none
    deadline_at: float | None
    allow_degraded: bool
    consent: Consent
    reason: str | None = None  # why `rung` is not `requested`, if it is not
    size: Size | None = None  # None: the bundle's own
    windows: bool = False  # denoise a larger size in overlapping windows of the bundle's own
    caller: str = ""
    weight: float = 1.0  # of its caller's share of the machine
    negative_prompt: str = ""  # the text that guidance subtracts; "": none
    guidance_embedded: float | None = None  # the scale that the network is told; None: it is told none
    source: SourceLatent[Latent] | None = None  # the picture that it starts from; None: it starts from noise
    adapters: tuple[AdapterUse, ...] = ()


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
    """A sample that ends without an image, and why."""

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
    """The outcome of one step; `rows` are those the network computed, padding included."""

    finished: tuple[Finished, ...] = ()
    failed: tuple[Failed, ...] = ()
    previews: tuple[Preview, ...] = ()
    changes: tuple[Change, ...] = ()
    stop_reason: Literal["cap", "idle"] = "idle"  # as in `scheduler.Batch`
    rows: int = 0
    seconds: float = 0.0  # of a step of the whole turn: since the end of the last one, if it was running
    predicted_s: float = 0.0  # by the cost model, before the step
    steps: int = 1  # that each sample took; several where its rows live on a device


def not_finite(step: int, steps: int) -> NumericalError:
    """Return the error of a sample with numbers that are not finite."""
    return NumericalError(f"the model's output at step {step} of {steps} is not finite")


class KnownChange(NamedTuple):
    """The change (rows, h, w, D) that the first blocks made of the tokens of each row, at a step.

    `latent` (C, H, W) is what they read. Of a resumed sample the change is None until it is computed again.
    """

    step: int
    latent: Latent
    change: Latent | None


class Sample:
    """A running sample and the step of its trajectory that comes next.

    `conditionings` has its conditions as the embeddings of each backbone of its trajectory.
    `floor` is the lowest rung it may be moved to. A prediction is `composed` of so many conditions; it is
    `one_row` if that is one and the latent is not in windows. The latent lives in `groups`, at the sample's
    place. `known_changes` are those of its block cache, see `caching_pass`.
    """

    __slots__ = (
        "added_at",
        "composed",
        "conditionings",
        "cursor",
        "degraded",
        "floor",
        "flow",
        "generator",
        "geometry",
        "known_changes",
        "one_row",
        "reason",
        "request",
        "rung",
        "source",
        "started_at",
        "taken",
        "trajectory",
    )

    def __init__(
        self,
        request: SampleRequest,
        conditionings: dict[str, Conditioning],
        trajectory: Trajectory,
        *,
        geometry: Geometry,
        floor: Rung,
        added_at: float,
    ) -> None:
        self.request, self.geometry, self.floor = request, geometry, floor
        self.flow = Flow(request.caller, request.weight)
        self.conditionings = conditionings
        self.composed = len(next(iter(conditionings.values())).conditions)
        self.one_row = geometry.windows is None and self.composed == 1
        self.trajectory = trajectory
        self.cursor = 0  # index of the next step of the trajectory
        self.taken = 0  # steps done, over all trajectories
        self.rung = request.rung
        self.reason = request.reason
        self.degraded = request.rung != request.requested
        self.generator = np.random.Generator(np.random.Philox(request.seed))
        self.source: NoisySource[Latent] | None = None  # drawn by `begin`
        self.known_changes: list[KnownChange] = []
        self.added_at = added_at
        self.started_at: float | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def deadline_at(self) -> float | None:
        return self.request.deadline_at

    @property
    def backbone(self) -> str:
        """The name of the backbone that the next step runs on; "" is the bundle's own."""
        return self.trajectory.backbones[self.cursor]

    @property
    def conditioning(self) -> Conditioning:
        """The conditions of the next step."""
        return self.conditionings[self.backbone]

    @property
    def guided(self) -> bool:
        """True if guidance acts on the next step."""
        return self.trajectory.guided[self.cursor]

    def guided_within(self, steps: int) -> bool:
        """Return whether guidance acts on one of the next so many steps."""
        return True in self.trajectory.guided[self.cursor : self.cursor + steps]

    @property
    def rows(self) -> int:
        """Rows of the next step: one for each window and condition, and one a window where guidance acts."""
        return self.geometry.rows * (self.composed + self.guided)

    @property
    def most_rows(self) -> int:
        """Rows of a step at which guidance acts."""
        return self.geometry.rows * (self.composed + 1)

    @property
    def level(self) -> float:
        """The noise level of the next step, at which the sample stands."""
        return self.trajectory.levels[self.cursor]

    @property
    def since(self) -> int:
        """The steps before the next one that are of its backbone, with the same rows."""
        return self.trajectory.since[self.cursor]

    @property
    def told(self) -> int:
        """The bits of the float32 that the network is told of that level."""
        return self.trajectory.told[self.cursor]

    @property
    def coefficients(self) -> npt.NDArray[np.float32]:
        """The numbers of the next step, (10,), in the order of `StepCoefficients`."""
        row: npt.NDArray[np.float32] = self.trajectory.rows[self.cursor]
        return row

    @property
    def previous(self) -> float | None:
        """The noise level of the estimate in the solver's history; None before the first step."""
        return self.trajectory.levels[self.cursor - 1] if self.cursor else self.trajectory.previous

    @property
    def remaining_steps(self) -> int:
        return len(self.trajectory) - self.cursor

    @property
    def shows_preview(self) -> bool:
        """True after a step whose estimate is shown."""
        every = self.request.previews
        return bool(every and self.remaining_steps and self.taken % every == 0)

    @property
    def least_steps(self) -> int:
        """The steps left if it moved to its floor now."""
        return min(self.remaining_steps, steps_left(self.remaining_steps, self.rung, self.floor))

    @property
    def remaining_rows(self) -> float:
        """Rows of the steps left, as if the latent were one row; `geometry.cost` tokens each.

        They count by their cost, in rows of the bundle's own backbone.
        """
        return self.trajectory.rows_from(self.cursor, self.composed)

    @property
    def all_rows(self) -> float:
        """Rows of an image on this sample's trajectory, in rows of the bundle's own size and backbone."""
        return self.geometry.cost * self.trajectory.rows_from(0, self.composed)

    @property
    def steps(self) -> int:
        """All steps: those taken and those left."""
        return self.taken + self.remaining_steps

    def planned(self) -> PlannedSample:
        """Return this sample as the planner sees it."""
        return PlannedSample(
            id=self.id,
            deadline_at=self.deadline_at,
            rung=self.rung,
            remaining_steps=self.remaining_steps,
            guided=self.trajectory.scale != 1.0,
            consent=self.request.consent,
            allow_degraded=self.request.allow_degraded,
            started=self.taken > 0,
            noise=self.trajectory.noise[self.cursor],
            requested=self.request.requested,
            row_cost=self.geometry.cost,
            conditions=self.composed,
        )

    def begin(
        self, shape: tuple[int, ...], schedule: Schedule, source: SourceLatent[Latent] | None = None
    ) -> Latent:
        """Draw the noise (C, H, W) of the seed; return the latent before the first step."""
        noise: Latent = self.generator.standard_normal(shape, np.float32)
        if source is None:
            return noise
        self.source = NoisySource(source, noise, schedule)
        return self.source.start(self.level, self.rung.strength)

    def keep(self, latent: Latent, *, clean: bool = False) -> Latent:
        """Return a latent (C, H, W) with what stays of the picture put back.

        The latent is that after a step, or a clean one.
        """
        if self.source is None:
            return latent
        return self.source.keep(latent, None if clean or not self.remaining_steps else self.level)

    def advance(self, started_at: float, steps: int = 1) -> None:
        """Count steps, the first of which began at `started_at`."""
        if self.started_at is None:
            self.started_at = started_at
        self.cursor += steps
        self.taken += steps

    def follow(self, change: Change, trajectory: Trajectory) -> None:
        """Continue on another trajectory.

        A sample that has taken steps counts as degraded even if it later climbs back.
        """
        self.rung, self.trajectory, self.cursor = change.rung, trajectory, 0
        self.degraded = self.taken > 0 or change.rung != self.request.requested
        if change.reason != ROOM:
            self.reason = change.reason
        elif not self.degraded:
            self.reason = None

    def finished(self, latent: Latent, now: float) -> Finished:
        """Return the result of this sample: its last step ended at `now` with `latent` (C, H, W)."""
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
