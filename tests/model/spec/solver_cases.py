"""Schedules, grids and networks with a known right answer, for the tests of the solvers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import PREDICTIONS, Schedule, make_schedule, training_target
from ditserve.model.spec.grids import GRIDS, grid
from ditserve.model.spec.solvers import SOLVERS, StepTable, trajectory

Samples = npt.NDArray[np.float64]
Network = Callable[[Any, int], Any]
COLUMNS = ("timestep", "x0_x", "x0_out", "a", "b", "c", "s")
START: Samples = np.random.default_rng(7).standard_normal((2, 4))
DETERMINISTIC = ("ddim", "euler", "dpmpp-2m", "unipc-1")

schedules = st.builds(
    make_schedule,
    st.sampled_from(["linear", "cosine"]),
    st.integers(2, 1100),
    prediction=st.sampled_from(PREDICTIONS),
    log_snr_shift=st.sampled_from([0.0, -2.0, 1.0]),
)
solvers = st.sampled_from(sorted(SOLVERS))
# "unipc-1" corrects only steps of its own table, so its tables cannot be spliced.
splicing = st.sampled_from(sorted(SOLVERS.keys() - {"unipc-1"}))


def legal_eta(solver: str, eta: float) -> float:
    """Return `eta` if the solver leaves it open, else 0, which every solver takes."""
    return eta if SOLVERS[solver].eta is None else 0.0


@st.composite
def grids(draw: st.DrawFn, schedule: Schedule) -> tuple[int, ...]:
    """Draw a legal grid of a schedule: one of a named kind, or any timesteps."""
    steps = draw(st.integers(1, min(schedule.timesteps, 60)))
    # "ddim-stride" has some counts of steps only.
    kind = draw(st.sampled_from([*(GRIDS.keys() - {"ddim-stride"}), "any"]))
    if kind != "any":
        return grid(kind, steps, schedule.timesteps)
    values = st.integers(0, schedule.timesteps - 1)
    return tuple(sorted(draw(st.sets(values, min_size=1, max_size=steps)), reverse=True))


def run(table: StepTable, x: Any, network: Network, **options: Any) -> list[Any]:
    """Return the sample after every step."""
    return [after for after, _ in trajectory(table, x, network, **options)]


def oracle(schedule: Schedule, x0: Any, noise: Any) -> Network:
    """Return the network that always knows the image and the noise."""

    def network(x: Any, t: int) -> Any:
        return training_target(schedule.prediction, schedule.alpha(t), schedule.sigma(t), x0, noise)

    return network


def gaussian(schedule: Schedule, std: float) -> Network:
    """Return the exact x0 prediction for data N(0, std²)."""

    def network(x: Any, t: int) -> Any:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return x * (alpha * std**2 / (alpha**2 * std**2 + sigma**2))

    return network


def bent(x: Any, t: int) -> Any:
    """Return a smooth output without a closed form, the same in numpy and torch."""
    return 0.8 * x + 0.3 * (x * x + 1.0) ** 0.5 * (1.0 - t / 1000.0) - 0.2


def marginal_std(schedule: Schedule, t: int, std: float) -> float:
    """Return the standard deviation of x_t for data N(0, std²), which scales a sample along the exact ODE."""
    return math.sqrt(schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2)


def draws(seed: int) -> Callable[[], Samples]:
    """Return a source of standard normal noise, shaped as START."""
    rng = np.random.default_rng(seed)
    return lambda: rng.standard_normal((2, 4))
