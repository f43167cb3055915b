"""The runs of the headline: each is one system in one situation, in the order in which they are worth having.

Pure: values and arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ditserve.bench.load.adapters import DrawnWith
from ditserve.bench.load.summary import Exchange
from ditserve.bench.load.workload import STEPS_MIX, OfferedRequest, RequestKind, Workload

Situation = Literal["alone", "saturated", "tuning", "offered", "own", "alike", "at once"]
# Batch size, seconds to wait for a batch, and the cap on requests inside a server.
Tuning = tuple[int, float, int]

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
# These behave as "step FIFO" while no request names a deadline, so they have its capacity.
SAME_CAPACITY = ("planner", "EDF")
CAPS = (1, 2, 3, 6)
TUNING_SEED = 99  # none of those reported
ROUNDS_ALONE = 2
CROWD = 24  # requests that come at once
# The load at which all requests ask for the same, and at which systems are compared at their own capacity.
CALM_LOAD = 0.7


@dataclass(frozen=True, slots=True)
class Run:
    """One system in one situation.

    `load` is a multiple of the capacity of `CAPACITY`, or for "own" of the system itself. `tuning` is what a
    tuning run tries.
    """

    situation: Situation
    system: str
    load: float = 0.0
    seed: int = 0
    tuning: Tuning | None = None

    @property
    def pool_key(self) -> str:
        """The name of all runs that differ from this one in their seed only."""
        return ", ".join([self.situation, self.system, *([f"{self.load:g}x"] if self.load else [])])

    @property
    def key(self) -> str:
        key = f"{self.pool_key}, seed {self.seed}"
        if self.tuning:
            batch, wait_s, cap = self.tuning
            key += f", batch {batch} wait {wait_s:g} cap {cap}"
        return key

    def workload(self, classes: int) -> Workload:
        if self.situation == "alike":
            return Workload(classes, mix=((STEPS_MIX[0][0], 1.0),), guided=1.0)
        return Workload(classes, "at-once" if self.situation == "at once" else "poisson")


# The promise and the unit of load come from these runs, so they are made before all others.
BASIS = tuple(
    Run(situation, system) for system in (REFERENCE, CAPACITY) for situation in ("alone", "saturated")
)


def planned_runs(systems: Sequence[str], loads: Sequence[float], seeds: Sequence[int]) -> Iterator[Run]:
    """Yield all runs except `BASIS` and the tuning.

    Every other round goes through the systems backwards, so that a machine that drifts does so for all of
    them.
    """
    apart = [name for name in systems if name not in SAME_CAPACITY]
    for number in range(ROUNDS_ALONE):
        for name in _there_and_back(apart, number):
            yield Run("alone", name, seed=number + 1)
            yield Run("saturated", name, seed=number + 1)
    compared = [name for name in COMPARED if name in systems]
    for number, seed in enumerate(seeds):
        for load in loads:
            yield from (Run("offered", name, load, seed) for name in _there_and_back(compared, number))
    yield from (Run("alike", name, CALM_LOAD, seeds[0]) for name in compared)
    for number, seed in enumerate(seeds):
        yield from (Run("at once", name, seed=seed) for name in _there_and_back(compared, number))
    for number, seed in enumerate(seeds):
        yield from (Run("own", name, CALM_LOAD, seed) for name in _there_and_back(compared, number))


def _there_and_back(names: Sequence[str], number: int) -> Sequence[str]:
    return names[:: -1 if number % 2 else 1]


def batch_tunings(system: str, choices: Sequence[tuple[int, float]]) -> tuple[Run, ...]:
    """Return the runs that try batches and waits for a peer, below capacity."""
    return tuple(
        Run("tuning", system, 0.7, TUNING_SEED, (batch, wait_s, max(4, 2 * batch)))
        for batch, wait_s in choices
    )


def cap_tunings(system: str, batch: int, wait_s: float) -> tuple[Run, ...]:
    """Return the runs that try caps for a peer, above capacity."""
    return tuple(Run("tuning", system, 1.1, TUNING_SEED, (batch, wait_s, cap)) for cap in CAPS)


def packed(exchange: Exchange, slowdown: float = 1.0) -> list[Any]:
    """Return an exchange as a line of JSON, its times divided by the machine's slowdown."""
    request, image = exchange.request, exchange.drawn_with
    drawn_with = [image.steps, image.rung, image.degraded] if image else []
    times = [round(time / slowdown, 4) for time in (request.at, exchange.sent, exchange.ended)]
    return [*times, request.kind.steps, request.kind.guided, exchange.status, *drawn_with]


def unpacked(line: Sequence[Any]) -> Exchange:
    """Return the exchange that `packed` wrote; the class and the seed are not kept."""
    at, sent, ended, steps, guided, status, *image = line
    request = OfferedRequest(at, RequestKind(steps, guided), 0, 0)
    return Exchange(request, sent, ended, status, DrawnWith(*image) if image else None)
