"""The scenarios of the simulator: step times, quality ladders, clusters and strategies.

Pure: tables and interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from ditserve.bench.simulate.host import STEADY, Regime
from ditserve.model.spec.stretches import Stretch
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung

ClaimOrder = Literal["arrival", "deadline"]
CLAIM_ORDERS: tuple[ClaimOrder, ...] = get_args(ClaimOrder)
PATIENT_SLO = 30.0  # a promise with which queues grow deep


@dataclass(frozen=True, slots=True)
class StepTimeCurve:
    """Seconds of a step at some batch sizes; linear between them, and beyond the last two."""

    name: str
    points: tuple[tuple[int, float], ...]
    max_rows: int

    def seconds(self, rows: float) -> float:
        for (less, faster), (more, slower) in pairwise(self.points):
            if rows <= more or more == self.points[-1][0]:
                return faster + (slower - faster) * (rows - less) / (more - less)
        return self.points[0][1]

    @property
    def peak(self) -> float:
        """The most rows a second, over all batch sizes."""
        return max(rows / self.seconds(rows) for rows in range(1, self.max_rows + 1))


CURVES: Mapping[str, StepTimeCurve] = {
    # Qwen-Image at 512 px, H200, bfloat16, compiled: SGLang pull request 22183.
    "gpu": StepTimeCurve(
        "gpu", ((1, 0.167), (2, 0.183), (3, 0.186), (4, 0.240), (8, 0.425), (16, 0.832)), 16
    ),
    # A row of 256 tokens keeps two AVX2 cores busy by itself: t = .08 + .92 rows, in units of one step.
    # The tiny bundle on one core: a pass of 1 ms and a third of that for every further row.
    "tiny": StepTimeCurve("tiny", ((1, 0.0030), (2, 0.0034), (4, 0.0042), (16, 0.009), (64, 0.028)), 64),
    "cpu": StepTimeCurve("cpu", ((1, 1.0), (16, 0.08 + 0.92 * 16)), 16),
}


def _rungs(solver: str, grid: str, fid: Mapping[int, float]) -> tuple[Rung, ...]:
    return tuple(Rung(f"{solver}-{n}", solver, n, grid, (0.0, 1.0), value) for n, value in fid.items())


# Published FID of DiT-XL/2 256 at guidance 1.5
# (L2C, arXiv:2406.01733, table 1; SmoothCache; arXiv:2505.21114, table 2).
_DDIM = _rungs("ddim", "leading", {50: 2.26, 30: 2.66, 25: 2.75, 20: 3.48, 16: 4.68, 12: 7.07, 10: 12.38})
_DPM = _rungs("dpmpp-2m", "uniform-t", {10: 3.23, 9: 3.77, 8: 4.93, 7: 7.62, 6: 14.4})

# Assumed, not published: a network of a third of the cost for the noisy half of the way, which loses as much
# as going from 50 to 30 steps does, and a student of 4 steps at the cost of the own network.
_LIGHT = (Stretch(0.5, "light", 0.33),)
_STITCHED = tuple(
    replace(rung, name=f"{rung.name} light>0.5", quality=rung.quality + 0.4, stretches=_LIGHT)
    for rung in (*_DDIM, *_DPM)
)
_STUDENT = Rung("student-4", "ddim", 4, "leading", (0.0, 1.0), 8.0, stretches=(Stretch(0.0, "student"),))

LADDERS: Mapping[str, Ladder] = {
    "ddim": Ladder(_DDIM),
    "dpmpp": Ladder((*_DDIM, *_DPM)),
    "backbones": Ladder((*_DDIM, *_DPM, *_STITCHED, _STUDENT)),
}


@dataclass(frozen=True, slots=True)
class SimulatedCluster:
    """Equal workers, which promise a deadline of `slo` times the seconds of a request alone.

    Two workers share a host, whose pace follows `regimes`. With `returning` the refused come back when they
    are told to. Requests are spread over `apis` processes that admit them.
    """

    curve: StepTimeCurve
    ladder: Ladder
    workers: int = 1
    slo: float = 3.0
    regimes: tuple[Regime, ...] = STEADY
    returning: bool = False
    apis: int = 1


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run the service.

    Args:
        unit: the content of a batch: whole requests with equally many steps, or single steps of any samples.
        order: the order in which samples get their steps.
        cap: most rows of a batch; None for the cost model's saturation batch size.
        admission: refuse a request whose deadline cannot be met.
        degrade: admission may accept a request at a lower rung.
        plan: plan all claimed samples anew at every step.
        lookahead: samples that all workers together claim beyond what can run.
        claims: the order of the queue.
        expire: drop a sample whose deadline has passed.
    """

    name: str
    unit: Literal["request", "step"] = "step"
    order: Literal["fifo", "deadline"] = "deadline"
    cap: int | None = None
    admission: bool = True
    degrade: bool = True
    plan: bool = True
    lookahead: int = 64
    claims: ClaimOrder = "deadline"
    expire: bool = True


PLANNED_EVERY_STEP = Strategy("planned every step")
STRATEGIES = (
    Strategy(
        "request batches",
        "request",
        "fifo",
        cap=8,
        admission=False,
        plan=False,
        claims="arrival",
        expire=False,
    ),
    Strategy(
        "FIFO steps",
        "step",
        "fifo",
        cap=8,
        admission=False,
        plan=False,
        lookahead=0,
        claims="arrival",
        expire=False,
    ),
    Strategy("FIFO + admission", "step", "fifo", degrade=False, plan=False, lookahead=0, claims="arrival"),
    Strategy("EDF + admission", degrade=False, plan=False),
    Strategy("planned at admission", plan=False),
    PLANNED_EVERY_STEP,
)
CLAIM_STRATEGIES = tuple(
    Strategy(f"{lookahead} by {order}", lookahead=lookahead, claims=order)
    for lookahead in (0, 16, 64)
    for order in CLAIM_ORDERS
)
