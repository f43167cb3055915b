"""Solvers as tables: a sampling run is a few float64 numbers per step, computed before the first step.

Pure: numpy only; no torch, no I/O, no randomness. Every solver advances a sample x by one expression,

    D  = x0_x · x + x0_out · output                    the network's estimate of the image
    x' = a · x + b · D + c · D' + d · D'' + s · z      of which D' and D'' are D one and two steps before,
                                                       and z is standard normal, drawn anew for every step

so rows with different solvers, grids and positions advance together, on numpy arrays and torch tensors alike.
A running sample changes its grid or its solver by taking its next coefficients from another table.

A table starts from one exact exponential step of the reverse process in log(alpha / sigma), with a share eta
of the ancestral noise. That step alone is DDIM (Song et al., arXiv:2010.02502, eq. 12). With eta 1 it is DDPM
(Ho et al., arXiv:2006.11239, eq. 7); with eta 0 it is Euler's method on the probability-flow ODE in sigma /
alpha (Karras et al., arXiv:2206.00364, §4).

A solver of higher order adds the change of D since the step before. DPM-Solver++(2M) (Lu et al.,
arXiv:2211.01095, algorithm 2; with eta 1 its SDE form, midpoint) extrapolates that change. It needs only the
previous D, whatever solver made it. UniPC (Zhao et al., arXiv:2302.04867, B(h) = exp(h) - 1) corrects the
step just taken, so it corrects only steps of its own table. UniPC-1 corrects a step of DDIM and has order 2,
UniPC-2 one of DPM-Solver++(2M) and has order 3. Thus every solver may follow any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ditserve.model.spec.diffusion import Array, FloatTable, Schedule
from ditserve.model.spec.flow_grids import check_levels


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """The coefficients of N steps, float64 (N,), read-only.

    Step i calls the network at the noise level `level[i]`, estimates D, and moves x to x' by the expression
    of this module. It needs no D of earlier steps where c[i] and d[i] are 0, and no noise where s[i] is 0. In
    the last step b is 1 and a, c, d, s are 0: the sample ends as D. Cast the coefficients to the dtype of the
    samples: a numpy float64 scalar would promote them.
    """

    solver: str
    level: FloatTable
    x0_x: FloatTable
    x0_out: FloatTable
    a: FloatTable
    b: FloatTable
    c: FloatTable
    d: FloatTable
    s: FloatTable

    def __post_init__(self) -> None:
        for column in self.columns:
            column.flags.writeable = False

    @property
    def columns(self) -> tuple[FloatTable, ...]:
        """The columns, in the order of the fields."""
        return (self.level, self.x0_x, self.x0_out, self.a, self.b, self.c, self.d, self.s)

    def __len__(self) -> int:
        return int(self.level.size)


@dataclass(frozen=True, slots=True, eq=False)
class _FirstOrder:
    """The steps x' = a · x + b · D + s · z of a grid, and the factor exp(-h) of sigma / alpha in each.

    With `continued` step 0 was taken by another table.
    """

    a: FloatTable
    b: FloatTable
    s: FloatTable
    shrink: FloatTable
    continued: bool

    @property
    def h(self) -> FloatTable:
        """The length of every step in log(alpha / sigma); infinite from alpha 0, and to sigma 0."""
        with np.errstate(divide="ignore"):
            return -np.log(self.shrink)


Weights = tuple[FloatTable, FloatTable]
# A change of D is extrapolated over a step of less than so many times its length.
_MOST_EXTRAPOLATED = 1000.0


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver: the eta that it fixes, None if the caller chooses, and its weights (c, d) of earlier D.

    With `uses_previous` its first step uses the D from before its table, if there is one.
    """

    eta: float | None
    history: Callable[[_FirstOrder], Weights]
    uses_previous: bool = False


def _no_history(step: _FirstOrder) -> Weights:
    return np.zeros_like(step.a), np.zeros_like(step.a)


def _dpmpp_2m(step: _FirstOrder) -> Weights:
    # The last step, to sigma 0, is infinitely long in log(alpha / sigma): it stays of first order.
    c, d = _no_history(step)
    c[1:-1] = -step.b[1:-1] * _ratios(step.h[:-1]) / 2.0
    return c, d


def _unipc_1(step: _FirstOrder) -> Weights:
    c, d = _no_history(step)
    c[1:] = -step.a[1:] * step.b[:-1] / 2.0
    return c, d


def _unipc_2(step: _FirstOrder) -> Weights:
    """Return the weights of DPM-Solver++(2M) whose steps are corrected once the next D is known.

    A step of length h, r times that of the step before, went along a line through its D and the one before.
    Corrected, it goes along the parabola through these and the next D, at -1 / r, 0 and 1 of the step. The
    first step has no D before it: its line is level, and instead of the parabola a line corrects it.
    """
    c, d = _dpmpp_2m(step)
    h = step.h
    ratio = _ratios(h[:-1])
    mean, square = _moments(h[1:-1])
    # The weights of the change to the next D, and, less the half that was extrapolated, of that before.
    after, before = np.full(h.size - 1, 0.5), np.zeros(h.size - 1)
    after[1:] = (mean + ratio * square) / (1.0 + ratio)
    before[1:] = ratio**2 * (mean - square) / (1.0 + ratio) - ratio / 2.0
    after[: int(step.continued)] = 0.0
    scale = step.a[1:] * step.b[:-1]
    c[1:] += scale * (before - after)
    d[1:] -= scale * before
    return c, d


def _ratios(h: FloatTable) -> FloatTable:
    """Return h[i + 1] / h[i], or 0 where the change of D over step i tells nothing of the next step.

    That is after a first step from alpha 0, which is infinitely long, and after one so short beside the next
    that the change is mostly rounding.
    """
    with np.errstate(divide="ignore"):
        ratio = h[1:] / h[:-1]
    return np.where(ratio < _MOST_EXTRAPOLATED, ratio, 0.0)


def _moments(h: FloatTable) -> Weights:
    """Return the means of u and of u² over 0..1 with the weight exp(h · u), for any h above 0."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        whole = -1.0 / np.expm1(-h)
        mean = whole - 1.0 / h
        square = whole - 2.0 * mean / h
    # Series where the differences would cancel.
    short = h < 0.01
    mean = np.where(short, 1 / 2 + h / 12, mean)
    return mean, np.where(short, 1 / 3 + h / 12 + h**2 / 360, square)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "ddim": Solver(eta=None, history=_no_history),
        "ddpm": Solver(eta=1.0, history=_no_history),
        "euler": Solver(eta=0.0, history=_no_history),
        "dpmpp-2m": Solver(eta=None, history=_dpmpp_2m, uses_previous=True),
        "unipc-1": Solver(eta=0.0, history=_unipc_1),
        "unipc-2": Solver(eta=0.0, history=_unipc_2, uses_previous=True),
    }
)

# The solver of which a network may have learned the variance of the steps.
LEARNED = "ddpm"


def step_table(
    solver: str, grid: Sequence[float], schedule: Schedule, *, eta: float = 0.0, previous: float | None = None
) -> StepTable:
    """Return the coefficients of every step of `solver` along `grid`; the last step leads to the clean image.

    `grid` is strictly decreasing noise levels, as `model.spec.grids.noise_levels` makes them. `eta` in 0..1
    is the share of ancestral noise, if the solver leaves it open; 0 is deterministic.

    Example: with alpha_bar (0.64, 0.36), alpha and sigma are 0.8, 0.6 at timestep 0 and 0.6, 0.8 at timestep
    1. "ddim" along (1, 0) is

        level     a     b
        1         0.75  0.35    a = 0.6 / 0.8, b = 0.8 - 0.75 · 0.6
        0         0     1       the sample ends as D

    and with D = x_0 its first step is exact: 0.75 · (0.6 · x_0 + 0.8 · z) + 0.35 · x_0 = 0.8 · x_0 + 0.6 · z.

    `previous` is for a running sample that goes on along a new grid: the level of its last D. "dpmpp-2m" and
    "unipc-2" use that D in the first new step, whichever solver made it; for the others `previous` changes
    nothing. After a step of "dpmpp-2m" at timestep 2, its table along (1, 0) with previous=2 is the last two
    lines of its table along (2, 1, 0). Where both steps are equally long in log(alpha / sigma), it is

        level     b         c           where b' is the b of "ddim"
        1         1.5 · b'  -0.5 · b'   b · D + c · D_previous extrapolates D by half a step
        0         1         0

    Without `previous` the line of timestep 1 has b = b' and c = 0.

    Raises:
        ValueError: an unknown solver, a grid not as stated, `eta` outside 0..1 or given to a solver that
            fixes another, or `previous` not a level above the first of the grid.
    """
    share = _share(solver, eta)
    level = check_levels(grid, schedule.process)
    continued = previous is not None and SOLVERS[solver].uses_previous
    if previous is not None:
        noisiest = schedule.process.noisiest
        if not level[0] < previous <= noisiest:
            raise ValueError(
                f"previous must be above the first level of the grid, {level[0]:g}, and at most "
                f"{noisiest:g}, not {previous}"
            )
        level = np.append(previous, level) if continued else level
    # The line of `previous`, a step already taken, is left out of the table.
    new = slice(len(level) - len(grid), None)
    x0_x, x0_out = schedule.x0_coefficients(level)
    step = _first_order(level, schedule, share, continued=continued)
    c, d = SOLVERS[solver].history(step)
    return StepTable(
        solver=solver,
        level=level[new],
        x0_x=x0_x[new],
        x0_out=x0_out[new],
        a=step.a[new],
        b=(step.b - c - d)[new],
        c=c[new],
        d=d[new],
        s=step.s[new],
    )


def trajectory(
    table: StepTable,
    x: Array,
    network: Callable[[Array, float], Array],
    *,
    noise: Callable[[], Array] | None = None,
    clip_x0: bool = False,
    previous: Array | None = None,
    keep: Callable[[Array, float | None], Array] | None = None,
) -> Iterator[tuple[Array, Array]]:
    """Take the steps of a table from `x`, yielding (x', D) after each; the last x' is the image.

    `x` has any shape, in numpy or torch. `network(x, level)` returns the (guided) output, shaped as `x`.
    `noise()` draws standard normal z, shaped as `x`, for the steps that need it. `clip_x0` clips D to [-1,
    1]. `previous` is the D from before the first step. `keep` puts back what stays of a picture in x' at its
    noise level, which is None for the last x' (see `NoisySource`).

    Raises:
        ValueError: at the first step, if the table needs noise or a previous D that was not given.
    """
    if noise is None and np.any(table.s):
        raise ValueError(f"this {table.solver} table is stochastic: pass noise, or build it with eta 0")
    if previous is None and table.c[0]:
        raise ValueError("this table continues a trajectory: pass the previous estimate of the image")
    earlier = None
    following = [*table.level.tolist()[1:], None]
    columns = map(np.ndarray.tolist, table.columns)
    for level, x0_x, x0_out, a, b, c, d, s, next_level in zip(*columns, following, strict=True):
        denoised = x0_x * x + x0_out * network(x, level)
        if clip_x0:
            denoised = denoised.clip(-1.0, 1.0)
        x = a * x + b * denoised
        if c:
            x = x + c * previous
        if d:
            x = x + d * earlier
        if s and noise is not None:
            x = x + s * noise()
        if keep is not None:
            x = keep(x, next_level)
        previous, earlier = denoised, previous
        yield x, denoised


def variance_bounds(grid: Sequence[float], schedule: Schedule) -> tuple[FloatTable, FloatTable]:
    """Return (log beta~, log beta) of every step of a grid, float64 (N,): the range of a learned variance.

    They are the logarithms of the posterior and of the forward variance of a step (arXiv:2006.11239, §3.2),
    for strides of any length. The posterior variance of the last step is 0; its logarithm is replaced by that
    of the step before, as in the published code, and in a grid of one step by log beta.

    Raises:
        ValueError: the grid is not strictly decreasing noise levels.
    """
    level = check_levels(grid, schedule.process)
    step = _first_order(level, schedule, 1.0)
    alpha = schedule.alpha(level)
    high = np.log1p(-((alpha / np.append(alpha[1:], 1.0)) ** 2))
    low = 2.0 * np.log(step.s[:-1])
    return np.append(low, low[-1:] if low.size else high), high


def learned_log_variance(v: Array, log_low: Any, log_high: Any) -> Array:
    """Return the log variance f · log_high + (1 - f) · log_low of learned channels `v`, f being (v + 1) / 2.

    `v` has any shape; inside -1..1 it interpolates. The bounds are those of `variance_bounds` and broadcast
    against `v`. "ddpm" with a learned variance adds exp(log variance / 2) · z instead of s · z, in every step
    but the last. Source: Nichol & Dhariwal, arXiv:2102.09672, eq. 15.
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


def _first_order(
    level: FloatTable, schedule: Schedule, share: float, *, continued: bool = False
) -> _FirstOrder:
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    next_alpha, next_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    shrink = (alpha * next_sigma) / (next_alpha * sigma)
    # The part of the noise in x that stays; s · z replaces the rest.
    kept = np.sqrt((1.0 - share**2) + (share * shrink) ** 2)
    return _FirstOrder(
        a=next_sigma / sigma * kept,
        b=next_alpha * (1.0 - shrink * kept),
        s=share * next_sigma * np.sqrt(1.0 - shrink**2),
        shrink=shrink,
        continued=continued,
    )
