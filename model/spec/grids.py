"""Grids: the decreasing noise levels that a sample visits on its way from noise to image.

A table of timesteps has grids of whole timesteps (`grid`), a flow has grids of sigma (`flow_grid`).
`noise_levels` chooses by the process.

Pure: numpy only; no torch, no I/O, no randomness.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ditserve.model.spec.diffusion import (
    CLEAN,
    FloatTable,
    NoiseProcess,
    RectifiedFlow,
    Schedule,
    VariancePreserving,
)


def noise_levels(kind: str, steps: int, schedule: Schedule) -> tuple[float, ...]:
    """Return the N = `steps` decreasing levels that a sample visits before the image.

    Raises:
        ValueError: the process of the schedule has no such grid, or not so many steps.
    """
    process = schedule.process
    if isinstance(process, VariancePreserving):
        return tuple(map(float, grid(kind, steps, process.timesteps)))
    return flow_grid(kind, steps, process.max_steps)


def noise_levels_from(level: float, steps: int, kind: str, schedule: Schedule) -> tuple[float, ...]:
    """Return `steps` levels, spaced as `kind` says, for a sample whose next one is `level`.

    They are fewer where there are not so many timesteps left. See `regrid` and `flow_regrid`.

    Raises:
        ValueError: a level that is not noisy, less than one step, or a bad kind.
    """
    process = schedule.process
    if isinstance(process, VariancePreserving):
        t = round(level)
        return tuple(map(float, regrid(t, min(steps, t + 1), kind, process.timesteps)))
    return flow_regrid(level, steps, kind)


def grid_names(schedule: Schedule) -> tuple[str, ...]:
    """Return the names of the grids that a schedule has."""
    return tuple(GRIDS if isinstance(schedule.process, VariancePreserving) else FLOW_GRIDS)


def even_grid(schedule: Schedule) -> str:
    """Return the name of the grid that starts at the noisiest level and is spaced evenly."""
    return "trailing" if isinstance(schedule.process, VariancePreserving) else "uniform"


def check_levels(levels: Sequence[float], process: NoiseProcess) -> FloatTable:
    """Return `levels` as float64 (N,).

    Raises:
        ValueError: there are none, or they do not decrease strictly down from the noisiest to the clean one.
    """
    values = np.array(levels, dtype=np.float64)
    if (
        values.ndim != 1
        or not values.size
        or not process.clean < values[-1] <= values[0] <= process.noisiest
        or not np.all(np.diff(values) < 0.0)
    ):
        raise ValueError(
            "a grid must be one or more noise levels that decrease strictly, "
            f"above {process.clean:g} and at most {process.noisiest:g}"
        )
    return values


def _uniform(steps: int) -> FloatTable:
    return np.linspace(1.0, 0.0, steps + 1)[:-1]


FLOW_GRIDS: dict[str, Callable[[int], FloatTable]] = {"uniform": _uniform}


def flow_grid(kind: str, steps: int, max_steps: int = 1000) -> tuple[float, ...]:
    """Return the N = `steps` decreasing sigmas that a sample of a flow visits before 0.

    "uniform" in 4 steps is 1, 0.75, 0.5, 0.25. `kind` may also be a list of N sigmas, such as "1,0.8,0.4".

    Raises:
        ValueError: an unknown kind, `steps` outside 1..`max_steps`, or a list that is not as stated.
    """
    if not 1 <= steps <= max_steps:
        raise ValueError(f"steps must be in 1..{max_steps}, not {steps}")
    if kind in FLOW_GRIDS:
        return tuple(FLOW_GRIDS[kind](steps).tolist())
    values = _explicit_sigmas(kind)
    if len(values) != steps:
        raise ValueError(f"the explicit grid has {len(values)} sigmas, but {steps} steps were asked for")
    return values


def flow_regrid(level: float, steps: int, kind: str) -> tuple[float, ...]:
    """Return `steps` sigmas, spaced as `kind` says, for a sample of a flow whose next one is `level`.

    The first is always `level`. From 0.6 on, 3 steps of "uniform" are 0.6, 0.4, 0.2. The grid is read as a
    curve from 1 to 0, and the part of it below `level` is sampled evenly.

    Raises:
        ValueError: a level outside 0..1, or 0; `steps` < 1; or an unknown kind.
    """
    if not 0.0 < level <= 1.0:
        raise ValueError(f"sigma must be above 0 and at most 1, not {level}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    curve = np.append(FLOW_GRIDS[kind](FINE) if kind in FLOW_GRIDS else _explicit_sigmas(kind), 0.0)
    index = np.arange(curve.size, dtype=np.float64)
    reached = np.interp(-level, -curve, index)
    resampled = np.interp(np.linspace(reached, index[-1], steps + 1)[:-1], index, curve)
    return (float(level), *resampled[1:].tolist())


def _explicit_sigmas(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        names = ", ".join(FLOW_GRIDS)
        raise ValueError(f"grid of a flow must be {names} or comma-separated sigmas, not {text!r}") from None
    return tuple(check_levels(values, RectifiedFlow()).tolist())


def _leading(steps: int, timesteps: int) -> FloatTable:
    return np.arange(steps - 1, -1, -1, dtype=np.float64) * (timesteps // steps)


def _trailing(steps: int, timesteps: int) -> FloatTable:
    return np.round(timesteps - np.arange(steps, dtype=np.float64) * (timesteps / steps)) - 1.0


def _uniform_t(steps: int, timesteps: int) -> FloatTable:
    return np.round(np.linspace(0.0, timesteps - 1.0, steps + 1))[:0:-1]


GRIDS: dict[str, Callable[[int, int], FloatTable]]
GRIDS = {"leading": _leading, "trailing": _trailing, "uniform-t": _uniform_t}


# The points by which the curve of a named grid of sigma is interpolated.
FINE = 1000


def grid(kind: str, steps: int, timesteps: int = 1000) -> tuple[int, ...]:
    """Return the N = `steps` decreasing timesteps that a sample visits before CLEAN, for any N in 1..T.

    For 4 steps of T = 1000 timesteps the kinds give:

        "leading"    750, 500, 250, 0      k · (T // N), the grid of the published DiT
        "trailing"   999, 749, 499, 249    round(T - k · T / N) - 1, which starts at T - 1
        "uniform-t"  999, 749, 500, 250    round(linspace(0, T - 1, N + 1)) without its 0

    With N = T each of them gives all timesteps. `kind` may also be a list of N decreasing timesteps, such as
    "999,700,300". The names are those of Lin et al., arXiv:2305.08891, Table 2.

    Raises:
        ValueError: an unknown kind, `steps` outside 1..`timesteps`, or a list that is not as stated.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be in 1..{timesteps}, not {steps}")
    if kind in GRIDS:
        return _distinct(GRIDS[kind](steps, timesteps))
    values = _explicit(kind, timesteps)
    if len(values) != steps:
        raise ValueError(f"the explicit grid has {len(values)} timesteps, but {steps} steps were asked for")
    return values


def regrid(remaining_from: int, steps: int, kind: str, timesteps: int) -> tuple[int, ...]:
    """Return `steps` timesteps, spaced as `kind` says, for a sample whose next one is `remaining_from`.

    The first of them is always `remaining_from`. From 600 on, 3 steps are 600, 300, 0 for "leading" and 600,
    400, 199 for "trailing". Asking for as many steps as the old grid had left gives these steps again:
    exactly for "leading" and for an explicit list, within one timestep (rounding) for the others. Asked for
    another number of steps, an explicit list is interpolated as a curve and sampled evenly.

    Raises:
        ValueError: `remaining_from` outside 0..T-1, `steps` outside 1..`remaining_from` + 1, or a bad kind.
    """
    if not 0 <= remaining_from < timesteps:
        raise ValueError(f"remaining_from must be in 0..{timesteps - 1}, not {remaining_from}")
    if not 1 <= steps <= remaining_from + 1:
        raise ValueError(f"steps must be in 1..{remaining_from + 1} from {remaining_from} on, not {steps}")
    # `grid` gives a "leading" grid that ends at timestep 0, so this one does too.
    if kind == "leading":
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


def _explicit(text: str, timesteps: int) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(GRIDS)
        raise ValueError(f"grid must be one of {names} or comma-separated timesteps, not {text!r}") from None
    return check_grid(values, timesteps)


def _distinct(rounded: FloatTable) -> tuple[int, ...]:
    """Return `rounded` as strictly decreasing timesteps: 2, 2, 1, 0, 0 becomes 4, 3, 2, 1, 0.

    With nearly as many steps as timesteps, rounding makes neighbours equal. They are pushed apart.
    """
    rank = np.arange(rounded.size)
    values = np.minimum.accumulate(rounded + rank) - rank
    return tuple(int(value) for value in np.maximum(values, rank[::-1]))
