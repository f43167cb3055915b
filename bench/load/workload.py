"""The traffic to offer: times and contents of requests, drawn from a seed before anything is sent.

Every system, and every policy of the simulator, is therefore offered the same requests. Pure: numpy's
generators and arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
StepsMix = tuple[tuple[int, float], ...]  # counts of steps and their shares of the requests

STEPS_MIX: StepsMix = ((20, 0.7), (50, 0.3))
# A clip has so many times the tokens of a still, as 8 frames of its size have.
CLIP_COST = 8.0
BURSTINESS = 2.0  # coefficient of variation of the gaps of "bursts"
# A flash crowd comes at this many times the calm rate, and brings this share of all requests.
CROWD_HEIGHT, CROWD_SHARE = 4.0, 0.3


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request for one image at `at` seconds; `consents`: the planner may take fewer steps.

    `row_cost` is the tokens of its rows, in rows of a still.
    """

    at: float
    steps: int
    consents: bool = True
    row_cost: float = 1.0


def poisson(n: int, rate: float, random: np.random.Generator) -> Times:
    """Return independent arrival times at `rate` a second."""
    return np.cumsum(random.exponential(1.0 / rate, n))


def bursts(n: int, rate: float, random: np.random.Generator) -> Times:
    """Return arrival times with gamma gaps of coefficient of variation `BURSTINESS`."""
    shape = BURSTINESS**-2
    return np.cumsum(random.gamma(shape, 1.0 / (rate * shape), n))


def flash(n: int, rate: float, random: np.random.Generator) -> Times:
    """Return Poisson arrival times with a flash crowd in the middle; `rate` is the mean of the run."""
    calm = rate * (1.0 - CROWD_SHARE + CROWD_SHARE / CROWD_HEIGHT)
    gaps = random.exponential(1.0 / calm, n)
    start = int(n * (1.0 - CROWD_SHARE) / 2)
    gaps[start : start + int(n * CROWD_SHARE)] /= CROWD_HEIGHT
    return np.cumsum(gaps)


def at_once(n: int, rate: float, random: np.random.Generator) -> Times:
    """Return zeros: everybody arrives together, the pattern in which batching by steps gains least."""
    del rate, random
    return np.zeros(n)


PROCESSES: Mapping[str, Callable[[int, float, np.random.Generator], Times]] = {
    "poisson": poisson,
    "bursts": bursts,
    "flash": flash,
    "at-once": at_once,
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Arrivals by an arrival process.

    `refusing` is the share of requests that forbid fewer steps, and `clips` that of requests for clips.
    """

    process: str = "poisson"
    mix: StepsMix = STEPS_MIX
    refusing: float = 0.0
    clips: float = 0.0

    @property
    def mean_steps(self) -> float:
        return sum(steps * share for steps, share in self.mix)

    @property
    def mean_rows(self) -> float:
        """The mean work of a request without guidance, in rows of a still."""
        return self.mean_steps * (1.0 + self.clips * (CLIP_COST - 1.0))

    def draw(self, n: int, rate: float, seed: int) -> Sequence[Arrival]:
        """Return `n` arrivals at `rate` a second on average."""
        random = np.random.default_rng(seed)
        times = PROCESSES[self.process](n, rate, random)
        steps = random.choice([steps for steps, _ in self.mix], n, p=[share for _, share in self.mix])
        refuses = random.random(n) < self.refusing
        costs = np.where(random.random(n) < self.clips, CLIP_COST, 1.0)
        return [
            Arrival(float(at), int(count), not refused, float(cost))
            for at, count, refused, cost in zip(times, steps, refuses, costs, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class RequestKind:
    """The properties of a request that decide how much work it is."""

    steps: int
    guided: bool

    @property
    def rows(self) -> int:
        return self.steps * (2 if self.guided else 1)


@dataclass(frozen=True, slots=True)
class OfferedRequest:
    """A request for one image of class `label`, to be sent at `at` seconds."""

    at: float
    kind: RequestKind
    label: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to an HTTP server, of which a share `guided` is guided.

    Classes are drawn with p ∝ 1 / rank^`zipf`.
    """

    classes: int
    process: str = "poisson"
    mix: StepsMix = STEPS_MIX
    guided: float = 0.7
    zipf: float = 1.0

    @property
    def kinds(self) -> Mapping[RequestKind, float]:
        """Every kind of request with its share."""
        shares = {RequestKind(steps, True): share * self.guided for steps, share in self.mix}
        shares |= {RequestKind(steps, False): share * (1.0 - self.guided) for steps, share in self.mix}
        return {kind: share for kind, share in shares.items() if share > 0.0}

    def draw(self, n: int, rate: float, seed: int) -> tuple[OfferedRequest, ...]:
        """Return `n` requests at `rate` a second on average."""
        arrivals = Traffic(self.process, self.mix).draw(n, rate, seed)
        # A generator of its own keeps the arrivals the same for any guidance and classes.
        random = np.random.default_rng((seed, 1))
        guided = random.random(n) < self.guided
        weights = np.arange(1, self.classes + 1) ** -self.zipf
        labels = random.choice(self.classes, n, p=weights / weights.sum())
        return tuple(
            OfferedRequest(
                arrival.at, RequestKind(arrival.steps, bool(is_guided)), int(label), 1000 * seed + k
            )
            for k, (arrival, is_guided, label) in enumerate(zip(arrivals, guided, labels, strict=True))
        )
