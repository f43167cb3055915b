"""Schedules, grids and networks with a known right answer, for the tests of the solvers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import PREDICTIONS, RectifiedFlow, Schedule, make_schedule, training_target
from ditserve.model.spec.grids import grid_names, noise_levels
from ditserve.model.spec.solvers import SOLVERS, StepTable, trajectory

Samples = npt.NDArray[np.float64]
Network = Callable[[Any, float], Any]
COLUMNS = ("level", "x0_x", "x0_out", "a", "b", "c", "d", "s")
START: Samples = np.random.default_rng(7).standard_normal((2, 4))
DETERMINISTIC = ("ddim", "euler", "dpmpp-2m", "unipc-1", "unipc-2")
ORDERS = (("ddim", 1), ("euler", 1), ("dpmpp-2m", 2), ("unipc-1", 2), ("unipc-2", 3))

flows = st.builds(
    Schedule,
    st.just(RectifiedFlow()),
    st.sampled_from(["flow", "v", "x0"]),
    st.sampled_from(["sigma", "1-sigma"]),
    output_sign=st.sampled_from([1, -1]),
)
tables = st.builds(
    make_schedule,
    st.sampled_from(["linear", "cosine"]),
    st.integers(2, 1100),
    prediction=st.sampled_from(PREDICTIONS),
    log_snr_shift=st.sampled_from([0.0, -2.0, 1.0]),
)
schedules = tables | flows
solvers = st.sampled_from(sorted(SOLVERS))
# UniPC corrects only steps of its own table, so its tables cannot be spliced.
splicing = st.sampled_from(sorted(SOLVERS.keys() - {"unipc-1", "unipc-2"}))


def legal_eta(solver: str, eta: float) -> float:
    """Return `eta` if the solver leaves it open, else 0, which every solver takes."""
    return eta if SOLVERS[solver].eta is None else 0.0


@st.composite
def grids(draw: st.DrawFn, schedule: Schedule) -> tuple[float, ...]:
    """Draw a legal grid of a schedule: one of a named kind, or any levels."""
    steps = draw(st.integers(1, min(schedule.max_steps, 60)))
    # "ddim-stride" has some counts of steps only.
    names = [name for name in grid_names(schedule) if name != "ddim-stride"]
    kind = draw(st.sampled_from([*names, "any"]))
    if kind != "any":
        return noise_levels(kind, steps, schedule)
    shares = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=steps))
    levels = {float(schedule.process.trained_levels(share / 1000)) for share in shares}
    return tuple(sorted(levels, reverse=True))


def run(table: StepTable, x: Any, network: Network, **options: Any) -> list[Any]:
    """Return the sample after every step."""
    return [after for after, _ in trajectory(table, x, network, **options)]


def oracle(schedule: Schedule, x0: Any, noise: Any) -> Network:
    """Return the network that always knows the image and the noise."""

    def network(x: Any, t: float) -> Any:
        target = training_target(schedule.prediction, schedule.alpha(t), schedule.sigma(t), x0, noise)
        return schedule.output_sign * target

    return network


def gaussian(schedule: Schedule, std: float) -> Network:
    """Return the exact x0 prediction for data N(0, std²)."""

    def network(x: Any, t: float) -> Any:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return x * (alpha * std**2 / (alpha**2 * std**2 + sigma**2))

    return network


def bent(x: Any, t: float) -> Any:
    """Return a smooth output without a closed form, the same in numpy and torch."""
    return 0.8 * x + 0.3 * (x * x + 1.0) ** 0.5 * (1.0 - t / 1000.0) - 0.2


def marginal_std(schedule: Schedule, t: float, std: float) -> float:
    """Return the standard deviation of x_t for data N(0, std²), which scales a sample along the exact ODE."""
    return math.sqrt(schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2)


def draws(seed: int, shape: tuple[int, ...] = START.shape) -> Callable[[], Samples]:
    """Return a source of standard normal noise, float64 that float32 holds: diffusers casts it to that."""
    rng = np.random.default_rng(seed)
    return lambda: rng.standard_normal(shape).astype(np.float32).astype(np.float64)
