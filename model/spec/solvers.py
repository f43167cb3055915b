"""Solvers as tables: a whole sampling run is a few float64 numbers per step, computed before the first step.

Pure: numpy only; no torch, no I/O, no randomness. Every solver advances a sample x by one expression,

    D  = x0_x · x + x0_out · output                    the network's estimate of the image
    x' = a · x + b · D + c · D_previous + s · z        z standard normal, drawn anew for every step

so rows with different solvers, grids and positions advance together, on numpy arrays and torch tensors alike,
and a running sample changes its grid or its solver by taking its next coefficients from another table.

Every table starts from one exact exponential step of the reverse process in log(alpha / sigma), with a share
eta of the ancestral noise. Alone it is DDIM (Song et al., arXiv:2010.02502, eq. 12), whose eta 1 is DDPM (Ho
et al., arXiv:2006.11239, eq. 7) and whose eta 0 is Euler's method on the probability-flow ODE in sigma /
alpha (Karras et al., arXiv:2206.00364, §4). A solver of second order adds how D has changed since the step
before: DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, algorithm 2; with eta 1 its SDE form, midpoint) carries
the change forward, which needs the previous D alone, whatever step was taken with it. UniPC-1 (Zhao et al.,
arXiv:2302.04867, B(h) = exp(h) - 1) corrects the step just taken, so it corrects only steps of its own table.
Every solver may thus follow any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Array, FloatTable, Schedule, check_grid, x0_coefficients


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """One line per step of a grid: `timestep` int64 (N,), coefficients float64 (N,), all read-only.

    Step i asks the network at `timestep[i]`, estimates D, and moves to x' as the module says. Where c[i] is 0
    no previous D is needed, where s[i] is 0 no noise; in the last line b is 1 and the others are 0: the
    sample ends as D. Cast coefficients to the samples' dtype: a numpy float64 scalar would promote them.
    """

    solver: str
    timestep: npt.NDArray[np.int64]
    x0_x: FloatTable
    x0_out: FloatTable
    a: FloatTable
    b: FloatTable
    c: FloatTable
    s: FloatTable

    def __post_init__(self) -> None:
        for column in (self.timestep, self.x0_x, self.x0_out, self.a, self.b, self.c, self.s):
            column.flags.writeable = False

    def __len__(self) -> int:
        return int(self.timestep.size)


@dataclass(frozen=True, slots=True, eq=False)
class _FirstOrder:
    """The steps x' = a · x + b · D + s · z of a grid, and by how much each shrinks sigma / alpha, exp(-h)."""

    a: FloatTable
    b: FloatTable
    s: FloatTable
    shrink: FloatTable


@dataclass(frozen=True, slots=True)
class Solver:
    """What tells solvers apart: the eta it fixes (None: the caller's choice), and its weight of D_previous.

    `carries`: its first step makes use of the D from before its table, if there is one.
    """

    eta: float | None
    history: Callable[[_FirstOrder], FloatTable]
    carries: bool = False


def _none(step: _FirstOrder) -> FloatTable:
    return np.zeros_like(step.a)


def _dpmpp_2m(step: _FirstOrder) -> FloatTable:
    h = -np.log(step.shrink[:-1])  # the last step, to sigma 0, is infinitely long and stays of first order
    c = _none(step)
    c[1:-1] = -step.b[1:-1] * h[1:] / (2.0 * h[:-1])
    return c


def _unipc_1(step: _FirstOrder) -> FloatTable:
    c = _none(step)
    c[1:] = -step.a[1:] * step.b[:-1] / 2.0
    return c


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "ddim": Solver(eta=None, history=_none),
        "ddpm": Solver(eta=1.0, history=_none),
        "euler": Solver(eta=0.0, history=_none),
        "dpmpp-2m": Solver(eta=None, history=_dpmpp_2m, carries=True),
        "unipc-1": Solver(eta=0.0, history=_unipc_1),
    }
)


def step_table(
    solver: str, grid: Sequence[int], schedule: Schedule, *, eta: float = 0.0, previous: int | None = None
) -> StepTable:
    """The coefficients of every step of `solver` along `grid`; the last step leads to the clean image.

    `grid` is strictly decreasing timesteps in 0..T-1, as from `model.diffusion.grid`. `eta` in 0..1 is the
    share of ancestral noise where the solver leaves it open: 0 deterministic, 1 the full reverse process.
    `previous` is the timestep of the running sample's last D when it goes on along a new grid. A solver that
    carries it uses that D in the first new step, whichever solver it comes from, and the table equals the
    tail of the table of the spliced grid; to the others it makes no difference.

    Raises:
        ValueError: an unknown solver, a grid not as stated, `eta` outside 0..1 or given to a solver that
            fixes another, or `previous` not a timestep above the first of the grid.
    """
    share = _share(solver, eta)
    walked = check_grid(grid, schedule.timesteps)
    if previous is not None:
        if not walked[0] < previous < schedule.timesteps:
            raise ValueError(
                f"previous must be above the first timestep of the grid, {walked[0]}, and below "
                f"{schedule.timesteps}, not {previous}"
            )
        walked = (previous, *walked) if SOLVERS[solver].carries else walked
    new = slice(len(walked) - len(grid), None)  # all but the line of `previous`, a step already taken
    timestep = np.array(walked, dtype=np.int64)
    x0_x, x0_out = x0_coefficients(schedule.prediction, schedule.alphas[timestep], schedule.sigmas[timestep])
    step = _first_order(timestep, schedule, share)
    c = SOLVERS[solver].history(step)
    return StepTable(
        solver=solver,
        timestep=timestep[new],
        x0_x=x0_x[new],
        x0_out=x0_out[new],
        a=step.a[new],
        b=(step.b - c)[new],
        c=c[new],
        s=step.s[new],
    )


def trajectory(
    table: StepTable,
    x: Array,
    network: Callable[[Array, int], Array],
    *,
    noise: Callable[[], Array] | None = None,
    clip_x0: bool = False,
    previous: Array | None = None,
) -> Iterator[tuple[Array, Array]]:
    """Walk a table from `x` (any shape, numpy or torch), yielding (x', D) per step; x' ends as the image.

    `network(x, timestep)` gives the (guided) output, shaped as `x`; `noise()` draws standard normal z like
    `x` for the steps that want it; `clip_x0` clips D to [-1, 1]; `previous` is the D before the first line.

    Raises:
        ValueError: at the first step, if the table needs noise or a previous D that was not given.
    """
    if noise is None and np.any(table.s):
        raise ValueError(f"this {table.solver} table is stochastic: pass noise, or build it with eta 0")
    if previous is None and table.c[0]:
        raise ValueError("this table continues a trajectory: pass the previous estimate of the image")
    columns = (table.timestep, table.x0_x, table.x0_out, table.a, table.b, table.c, table.s)
    for t, x0_x, x0_out, a, b, c, s in zip(*(column.tolist() for column in columns), strict=True):
        denoised = x0_x * x + x0_out * network(x, t)
        if clip_x0:
            denoised = denoised.clip(-1.0, 1.0)
        x = a * x + b * denoised
        if c:
            x = x + c * previous
        if s and noise is not None:
            x = x + s * noise()
        previous = denoised
        yield x, denoised


def variance_bounds(grid: Sequence[int], schedule: Schedule) -> tuple[FloatTable, FloatTable]:
    """(log beta~, log beta) of every step of a grid, float64 (N,): the range in which a variance is learned.

    They are the posterior and the forward variance of a step (arXiv:2006.11239, §3.2), for strides of any
    length. The posterior variance of the last step is 0; its logarithm is clipped to that of the step before,
    as in the published code (to log beta in a grid of one step).

    Raises:
        ValueError: the grid is not strictly decreasing timesteps in 0..T-1.
    """
    timestep = np.array(check_grid(grid, schedule.timesteps), dtype=np.int64)
    step = _first_order(timestep, schedule, share=1.0)
    high = np.log1p(-((schedule.alphas[timestep] / np.append(schedule.alphas[timestep[1:]], 1.0)) ** 2))
    low = 2.0 * np.log(step.s[:-1])
    return np.append(low, low[-1:] if low.size else high), high


def learned_log_variance(v: Array, log_low: Any, log_high: Any) -> Array:
    """Log variance from the learned channels `v`: f · log_high + (1 - f) · log_low with f = (v + 1) / 2.

    Nichol & Dhariwal, arXiv:2102.09672, eq. 15. `v` is any shape, inside -1..1 where the network
    interpolates; the bounds, from `variance_bounds`, broadcast against it. "ddpm" with a learned variance
    adds exp(log variance / 2) · z in place of s · z, in every step but the last.
    """
    share = (v + 1.0) / 2.0
    log_variance: Array = share * log_high + (1.0 - share) * log_low
    return log_variance


def _share(solver: str, eta: float) -> float:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {solver!r}")
    fixed = SOLVERS[solver].eta
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in 0..1, not {eta}")
    if fixed is not None and eta not in (0.0, fixed):
        raise ValueError(f"solver {solver!r} fixes eta at {fixed:g}: leave eta out")
    return float(eta if fixed is None else fixed)


def _first_order(timestep: npt.NDArray[np.int64], schedule: Schedule, share: float) -> _FirstOrder:
    alpha, sigma = schedule.alphas[timestep], schedule.sigmas[timestep]
    next_alpha, next_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    shrink = (alpha * next_sigma) / (next_alpha * sigma)
    kept = np.sqrt((1.0 - share**2) + (share * shrink) ** 2)  # of the noise in x; s · z replaces the rest
    return _FirstOrder(
        a=next_sigma / sigma * kept,
        b=next_alpha * (1.0 - shrink * kept),
        s=share * next_sigma * np.sqrt(1.0 - shrink**2),
        shrink=shrink,
    )
