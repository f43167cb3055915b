"""Grids: the decreasing noise levels that a sample visits on its way from noise to image.

A table of timesteps has grids of whole timesteps (`grid`), a flow those of `flow_grids.flow_grid`.
`noise_levels` chooses by the process.

A grid has a name, or is a list. Which one suits a request follows from the solver and the number of steps.
Pure: numpy only; no torch, no I/O, no randomness. `model.spec.sigma_grids` has the grids of flow models.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from ditserve.model.spec.diffusion import CLEAN, FloatTable, RectifiedFlow, Schedule
from ditserve.model.spec.flow_grids import FINE, flow_grid, flow_regrid
from ditserve.model.spec.sigma_grids import SPACINGS


def noise_levels(kind: str, steps: int, schedule: Schedule) -> tuple[float, ...]:
    """Return the N = `steps` decreasing levels that a sample visits before the image.

    Raises:
        ValueError: the process of the schedule has no such grid, or not so many steps.
    """
    process = schedule.process
    if isinstance(process, RectifiedFlow):
        return flow_grid(kind, steps, process)
    return tuple(map(float, grid(kind, steps, process.max_steps)))


def noise_levels_from(
    level: float, steps: int, kind: str, schedule: Schedule, *, whole: int = FINE
) -> tuple[float, ...]:
    """Return `steps` levels, spaced as `kind` says, for a sample whose next one is `level`.

    They are fewer where there are not so many timesteps left. `whole` is the number of steps of the whole
    grid. See `regrid` and `flow_regrid`.

    Raises:
        ValueError: a level that is not noisy, less than one step, or a bad kind.
    """
    process = schedule.process
    if isinstance(process, RectifiedFlow):
        return flow_regrid(level, steps, kind, process, whole)
    t = round(level)
    return tuple(map(float, regrid(t, min(steps, t + 1), kind, process.max_steps)))


def grid_names(schedule: Schedule) -> tuple[str, ...]:
    """Return the names of the grids that a schedule has."""
    return tuple(SPACINGS if isinstance(schedule.process, RectifiedFlow) else GRIDS)


def even_grid(schedule: Schedule) -> str:
    """Return the name of the grid that starts at the noisiest level and is spaced evenly."""
    return "uniform" if isinstance(schedule.process, RectifiedFlow) else "trailing"


def _leading(steps: int, timesteps: int) -> FloatTable:
    return np.arange(steps - 1, -1, -1, dtype=np.float64) * (timesteps // steps)


def _ddim_stride(steps: int, timesteps: int) -> FloatTable:
    stride = -(-timesteps // steps)
    if -(-timesteps // stride) != steps:
        fewer = -(-timesteps // stride)
        more = -(-timesteps // (stride - 1))
        raise ValueError(
            f"grid ddim-stride has no whole stride that visits {steps} of {timesteps} timesteps: "
            f"take {fewer} or {more} steps, or another grid"
        )
    return np.arange(steps - 1, -1, -1, dtype=np.float64) * stride


def _trailing(steps: int, timesteps: int) -> FloatTable:
    return np.round(timesteps - np.arange(steps, dtype=np.float64) * (timesteps / steps)) - 1.0


def _uniform_t(steps: int, timesteps: int) -> FloatTable:
    return np.round(np.linspace(0.0, timesteps - 1.0, steps + 1))[:0:-1]


def _linspace(steps: int, timesteps: int) -> FloatTable:
    # A single step would stand at timestep 0, where there is no noise to remove.
    if steps == 1:
        return np.array([timesteps - 1.0])
    return np.round(np.linspace(0.0, timesteps - 1.0, steps))[::-1]


def _respaced(steps: int, timesteps: int) -> FloatTable:
    if steps == 1:
        return _linspace(1, timesteps)
    # The published code adds the strides up, which decides how some halves are rounded.
    strides = np.full(steps - 1, (timesteps - 1) / (steps - 1))
    return np.round(np.cumsum(np.append(0.0, strides)))[::-1]


GRIDS: Mapping[str, Callable[[int, int], FloatTable]] = MappingProxyType(
    {
        "leading": _leading,
        "trailing": _trailing,
        "uniform-t": _uniform_t,
        "linspace": _linspace,
        "respaced": _respaced,
        "ddim-stride": _ddim_stride,
    }
)
# The grids whose last timestep is 0. The step to it is long in log(alpha / sigma) beside those before.
_TO_ZERO = frozenset({"leading", "linspace", "respaced", "ddim-stride"})
# The grids that spend two of their steps on the two ends of the noise range.
_BOTH_ENDS = frozenset({"linspace", "respaced"})
# The grid that a solver was published with; "trailing" for the others.
_PUBLISHED = MappingProxyType(
    {"ddpm": "respaced", "dpmpp-2m": "uniform-t", "unipc-1": "uniform-t", "unipc-2": "uniform-t"}
)
# The grids that a solver is clearly worse on. Extrapolation over the long step to timestep 0 makes
# DPM-Solver++(2M), and so UniPC-2, worse than DDIM below some 20 steps.
_UNSUITED = MappingProxyType(
    {"ddpm": frozenset({"leading", "ddim-stride"}), "dpmpp-2m": _TO_ZERO, "unipc-2": _TO_ZERO}
)
# A grid from pure noise starts in the noisiest tenth; with few steps, which are longer, in the noisiest
# quarter.
_NOISY, _NOISY_OF_FEW, _FEW = 0.1, 0.25, 10


def grid(kind: str, steps: int, timesteps: int = 1000) -> tuple[int, ...]:
    """Return the N = `steps` decreasing timesteps that a sample visits before CLEAN, for any N in 1..T.

    For 4 steps of T = 1000 timesteps the kinds give:

        "leading"      750, 500, 250, 0      k · (T // N)
        "trailing"     999, 749, 499, 249    round(T - k · T / N) - 1, which starts at T - 1
        "uniform-t"    999, 749, 500, 250    round(linspace(0, T - 1, N + 1)) without its 0
        "linspace"     999, 666, 333, 0      round(linspace(0, T - 1, N))
        "respaced"     999, 666, 333, 0      the same as the published DDPM sampling rounds it
        "ddim-stride"  750, 500, 250, 0      k · ceil(T / N), the published DDIM sampling

    With N = T each of them gives all timesteps. A stride of ceil(T / N) visits exactly N timesteps for some N
    only, such as 36 and 38 but not 37 of 1000. `kind` may also be a list of N decreasing timesteps, such as
    "999,700,300". The first three names are those of Lin et al., arXiv:2305.08891, Table 2, of diffusers, and
    of DPM-Solver.

    Raises:
        ValueError: an unknown kind, `steps` outside 1..`timesteps`, a list that is not as stated, or steps
            that "ddim-stride" does not have.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be in 1..{timesteps}, not {steps}")
    if kind in GRIDS:
        return _distinct(GRIDS[kind](steps, timesteps))
    values = _explicit(kind, timesteps)
    if len(values) != steps:
        raise ValueError(f"the explicit grid has {len(values)} timesteps, but {steps} steps were asked for")
    return values


def choose_grid(wanted: str | None, *, stated: str, solver: str, steps: int, schedule: Schedule) -> str:
    """Return the kind of grid for a sample from noise: the one `wanted`, or one that suits solver and steps.

    `stated` is the grid that the model's bundle states. It is kept where it suits. Otherwise the solver's own
    grid is taken, in a flow the even one. For a bundle that states "leading" the choice is

        ddim       50 steps     leading
        ddim       501 steps    respaced     leading would start at timestep 500
        ddpm       50 steps     respaced     as published
        dpmpp-2m   10 steps     uniform-t    with leading the error would be four times as large

    Raises:
        ValueError: the model takes no such number of steps; `wanted` is no grid of so many, or it starts
            below the noise that a sample begins with; `stated` is no grid.
    """
    schedule.check_steps(steps)
    if wanted is not None:
        first = noise_levels(wanted, steps, schedule)[0]
        if not _starts_noisy(first, steps, schedule):
            count = f" in {steps} step{'s' if steps > 1 else ''}"
            name = "the grid" if is_explicit(wanted) else f"grid {wanted}{count}"
            noisiest = f"{schedule.process.noisiest:g}"
            raise ValueError(
                f"{name} starts at noise level {first:g} of {noisiest}, below the noise that a sample begins "
                f"with: start at {noisiest}, as the grid {even_grid(schedule)} does"
            )
        return wanted
    if stated not in grid_names(schedule) and not is_explicit(stated):
        noise_levels(stated, steps, schedule)
    if isinstance(schedule.process, RectifiedFlow):
        return stated if fits(stated, steps, schedule) else even_grid(schedule)
    candidates = [] if stated in _UNSUITED.get(solver, ()) else [stated]
    if stated in candidates and stated in _TO_ZERO:
        candidates.append("respaced")  # the nearest to it that every number of steps has
    candidates.append(_PUBLISHED.get(solver, "trailing"))
    return next((kind for kind in candidates if fits(kind, steps, schedule)), "trailing")


def explicit_grid(levels: Sequence[float]) -> str:
    """Return the kind of grid that visits `levels`, such as "999,700,300" for 999.0, 700.0 and 300.0."""
    return ",".join(str(int(level)) if level == int(level) else repr(level) for level in levels)


def is_explicit(kind: str) -> bool:
    """Return whether a kind of grid is a list of levels, and not a name."""
    return kind[:1].isdigit()


@lru_cache(1024)
def fits(kind: str, steps: int, schedule: Schedule) -> bool:
    """Return whether `kind` has a good grid of so many steps: one that starts near the noisy end.

    Near is two strides: "leading" of 100 steps starts at 990, of 101 steps at 900, with an error half as
    large again. Few steps must not be spent on both ends: with 4 steps the error of "linspace" is a third
    above that of "trailing", with 12 it is the same.
    """
    if kind in _BOTH_ENDS and steps < _FEW:
        return False
    try:
        schedule.check_steps(steps)
        first = noise_levels(kind, steps, schedule)[0]
    except ValueError:
        return False
    two_strides = 2 * schedule.max_steps / steps
    near = schedule.process.noisiest - first <= two_strides
    return _starts_noisy(first, steps, schedule) and near


def regrid(remaining_from: int, steps: int, kind: str, timesteps: int) -> tuple[int, ...]:
    """Return `steps` timesteps, spaced as `kind` says, for a sample whose next one is `remaining_from`.

    The first of them is always `remaining_from`. From 600 on, 3 steps are 600, 300, 0 for "leading" and 600,
    400, 199 for "trailing". Asking for as many steps as the old grid had left gives these steps again:
    exactly for "leading", "ddim-stride" and an explicit list, within one timestep (rounding) for the others.
    Asked for another number of steps, an explicit list is interpolated as a curve and sampled evenly.

    Raises:
        ValueError: `remaining_from` outside 0..T-1, `steps` outside 1..`remaining_from` + 1, or a bad kind.
    """
    if not 0 <= remaining_from < timesteps:
        raise ValueError(f"remaining_from must be in 0..{timesteps - 1}, not {remaining_from}")
    if not 1 <= steps <= remaining_from + 1:
        raise ValueError(f"steps must be in 1..{remaining_from + 1} from {remaining_from} on, not {steps}")
    # `grid` gives grids of these kinds that end at timestep 0, so these do too.
    if kind in _TO_ZERO:
        return _distinct(np.round(np.linspace(remaining_from, 0.0, steps)))
    if kind in GRIDS:
        return grid(kind, steps, remaining_from + 1)
    curve = np.array([*_explicit(kind, timesteps), CLEAN], dtype=np.float64)
    index = np.arange(curve.size, dtype=np.float64)
    reached = np.interp(-float(remaining_from), -curve, index)
    resampled = np.interp(np.linspace(reached, index[-1], steps + 1)[:-1], index, curve)
    return _distinct(np.round([remaining_from, *resampled[1:]]))


def check_grid(timesteps: Sequence[int], total: int) -> tuple[int, ...]:
    """Return `timesteps` as ints.

    Raises:
        ValueError: there are none, or they do not decrease strictly in 0..`total` - 1.
    """
    values = tuple(operator.index(t) for t in timesteps)
    if not values or values[0] >= total or values[-1] < 0 or any(a <= b for a, b in pairwise(values)):
        raise ValueError(f"a grid must be one or more strictly decreasing timesteps in 0..{total - 1}")
    return values


def _starts_noisy(first: float, steps: int, schedule: Schedule) -> bool:
    share, noisiest = _NOISY_OF_FEW if steps < _FEW else _NOISY, schedule.process.noisiest
    return noisiest - first <= share * noisiest


def _explicit(text: str, timesteps: int) -> tuple[int, ...]:
    parts = text.split(",")
    try:
        values = tuple(int(part) for part in parts)
    except ValueError:
        names = ", ".join(GRIDS)
        alone = f"grid must be one of {names} or comma-separated timesteps, not {text!r}"
        whole = f"timesteps are whole numbers, not {text[:80]!r}"
        raise ValueError(whole if is_explicit(text) else alone) from None
    return check_grid(values, timesteps)


def _distinct(rounded: FloatTable) -> tuple[int, ...]:
    """Return `rounded` as strictly decreasing timesteps: 2, 2, 1, 0, 0 becomes 4, 3, 2, 1, 0.

    With nearly as many steps as timesteps, rounding makes neighbours equal. They are pushed apart.
    """
    rank = np.arange(rounded.size)
    values = np.minimum.accumulate(rounded + rank) - rank
    return tuple(int(value) for value in np.maximum(values, rank[::-1]))
