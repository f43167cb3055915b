"""Grids: the decreasing timesteps that a sample visits on its way from noise to image.

Pure: numpy only; no torch, no I/O, no randomness.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ditserve.model.spec.diffusion import CLEAN, FloatTable


def _leading(steps: int, timesteps: int) -> FloatTable:
    return np.arange(steps - 1, -1, -1, dtype=np.float64) * (timesteps // steps)


def _trailing(steps: int, timesteps: int) -> FloatTable:
    return np.round(timesteps - np.arange(steps, dtype=np.float64) * (timesteps / steps)) - 1.0


def _uniform_t(steps: int, timesteps: int) -> FloatTable:
    return np.round(np.linspace(0.0, timesteps - 1.0, steps + 1))[:0:-1]


GRIDS: dict[str, Callable[[int, int], FloatTable]]
GRIDS = {"leading": _leading, "trailing": _trailing, "uniform-t": _uniform_t}


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
