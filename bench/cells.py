"""What the headline consists of: cells, each one arm in one situation, in the order in which they are worth having.

Pure: values and arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ditserve.bench.adapters import Told
from ditserve.bench.answers import Exchange
from ditserve.bench.workload import STEPS, Asked, Kind, Workload

Situation = Literal["alone", "saturated", "tuning", "offered", "own", "alike", "at once"]
REFERENCE, CAPACITY = "diffusers + lock", "step FIFO"
COMPARED = (
    "planner",
    "EDF",
    "step FIFO",
    "LitServe + our ONNX",
    "diffusers + lock",
    "LitServe",
    "BentoML",
    "Ray Serve",
)
SAME = ("planner", "EDF")  # as "step FIFO", while nobody names a deadline
CAPS = (1, 2, 3, 6)
TUNING_SEED = 99  # none of those reported
ROUNDS = 2  # of what is measured alone: there and back again
CROWD = 24  # requests that come at once
CALM = 0.7  # load at which requests all want the same, and at which arms are held against their own capacity


@dataclass(frozen=True, slots=True)
class Cell:
    """`load` is in capacities of `CAPACITY`, or for "own" of the arm itself; `choice`: what a tuning cell sets, batch, wait and cap."""

    situation: Situation
    arm: str
    load: float = 0.0
    seed: int = 0
    choice: tuple[int, float, int] | None = None

    @property
    def key(self) -> str:
        parts = [self.situation, self.arm]
        parts += [f"{self.load:g}x"] if self.load else []
        parts += [f"seed {self.seed}"]
        parts += (
            [f"batch {self.choice[0]} wait {self.choice[1]:g} cap {self.choice[2]}"] if self.choice else []
        )
        return ", ".join(parts)

    def workload(self, classes: int) -> Workload:
        if self.situation == "alike":
            return Workload(classes, mix=((STEPS[0][0], 1.0),), guided=1.0)
        return Workload(classes, "at-once" if self.situation == "at once" else "poisson")


BASIS = tuple(Cell(situation, name) for name in (REFERENCE, CAPACITY) for situation in ("alone", "saturated"))


def measured(arms: Sequence[str], loads: Sequence[float], seeds: Sequence[int]) -> Iterator[Cell]:
    """All but `BASIS` and the tuning. Arms go there and back again, so that a machine that changes changes for all."""
    apart = [name for name in arms if name not in SAME]
    for number in range(ROUNDS):
        for name in _turned(apart, number):
            yield Cell("alone", name, seed=number + 1)
            yield Cell("saturated", name, seed=number + 1)
    compared = [name for name in COMPARED if name in arms]
    for number, seed in enumerate(seeds):
        for load in loads:
            yield from (Cell("offered", name, load, seed) for name in _turned(compared, number))
    yield from (Cell("alike", name, CALM, seeds[0]) for name in compared)
    for number, seed in enumerate(seeds):
        yield from (Cell("at once", name, seed=seed) for name in _turned(compared, number))
    for number, seed in enumerate(seeds):
        yield from (Cell("own", name, CALM, seed) for name in _turned(compared, number))


def _turned(names: Sequence[str], number: int) -> Sequence[str]:
    return names[:: -1 if number % 2 else 1]


def grid(arm: str, choices: Sequence[tuple[int, float]]) -> tuple[Cell, ...]:
    """The batches and waits to try for a peer, below capacity."""
    return tuple(
        Cell("tuning", arm, 0.7, TUNING_SEED, (batch, wait, max(4, 2 * batch))) for batch, wait in choices
    )


def caps(arm: str, batch: int, wait_s: float) -> tuple[Cell, ...]:
    """The caps to try, above capacity."""
    return tuple(Cell("tuning", arm, 1.1, TUNING_SEED, (batch, wait_s, cap)) for cap in CAPS)


def packed(exchange: Exchange, slow: float = 1.0) -> list[Any]:
    """An exchange as a line of JSON, its times as on a machine that is so many times as fast."""
    asked, told = exchange.asked, exchange.told
    made = [told.steps, told.rung, told.degraded] if told else []
    times = [round(each / slow, 4) for each in (asked.at, exchange.sent, exchange.ended)]
    return [*times, asked.kind.steps, asked.kind.guided, exchange.status, *made]


def unpacked(line: Sequence[Any]) -> Exchange:
    at, sent, ended, steps, guided, status, *made = line
    return Exchange(Asked(at, Kind(steps, guided), 0, 0), sent, ended, status, Told(*made) if made else None)
