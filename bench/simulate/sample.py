"""The simulated sample: one request in progress."""

from __future__ import annotations

from typing import NamedTuple

from ditserve.bench.load.workload import Arrival
from ditserve.model.spec.stretches import stretch_at
from ditserve.service.engine.fair_shares import Flow
from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.planning.planner import PlannedSample
from ditserve.service.rung import Consent, Rung


class RowsKind(NamedTuple):
    """Rows that share a pass: of one backbone with its cost, and of so many tokens, in rows of a still."""

    backbone: str = ""
    backbone_cost: float = 1.0
    tokens: float = 1.0

    @property
    def row_cost(self) -> float:
        """The cost of a row, in rows of a still on the model's own backbone."""
        return self.backbone_cost * self.tokens


class SimulatedSample:
    """One request in progress; satisfies the scheduler's protocol for samples that wait for steps.

    `noise` is the share of the trajectory still ahead. `quality` weighs each rung's with the share that was
    walked on it.
    """

    def __init__(self, index: int, arrival: Arrival, requested: Rung, floor: Rung, due: float) -> None:
        self.id = str(index)
        self.arrived = self.added_at = arrival.at
        self.requested = self.rung = requested
        self.floor = floor
        self.due, self.within_s = due, due - arrival.at
        self.retry_at: float | None = None  # when it was told to come back
        self.deadline_at: float | None = due
        self.remaining = requested.steps
        self.rows = 1
        self.queued_rows = 0  # while it is in the queue
        self.flow = Flow("", 1.0)
        self.taken = 0
        self.noise = 1.0
        self.quality = 0.0
        self.finished: float | None = None
        self.rejected = False
        self.came_back = 0  # how often, after a refusal
        self.taken_on_return = False  # when it came back for the first time
        self.consents, self.row_cost = arrival.consents, arrival.row_cost

    @property
    def steps(self) -> int:
        return self.taken + self.remaining

    @property
    def rows_kind(self) -> RowsKind:
        """The kind of rows of the next step, which share a pass."""
        stretch = stretch_at(self.rung.stretches, self.noise)
        return RowsKind(stretch.backbone, stretch.row_cost, self.row_cost)

    def rows_left(self, ladder: Ladder) -> float:
        """Return the rows of the steps left, by their tokens and the cost of their backbones."""
        return self.row_cost * ladder.rows_left(self.rung, self.remaining, self.noise, guided=False)

    @property
    def least_steps(self) -> int:
        return min(self.remaining, steps_left(self.remaining, self.rung, self.floor))

    @property
    def in_time(self) -> bool:
        return self.finished is not None and self.finished <= self.due

    def change_rung(self, rung: Rung) -> None:
        self.remaining = steps_left(self.remaining, self.rung, rung)
        self.rung = rung

    def take_step(self) -> None:
        share = self.noise / self.remaining
        self.quality += share * self.rung.quality
        self.noise -= share
        self.remaining -= 1
        self.taken += 1

    def for_planner(self) -> PlannedSample:
        return PlannedSample(
            id=self.id,
            deadline_at=self.deadline_at,
            rung=self.rung,
            remaining_steps=self.remaining,
            guided=False,
            consent=Consent(),
            allow_degraded=self.consents,
            started=self.taken > 0,
            noise=self.noise,
            requested=self.requested,
            row_cost=self.row_cost,
        )
