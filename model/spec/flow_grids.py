"""The grid of a flow by its name or as a list, from pure noise or for the rest of a sample.

A name is a spacing; the shift and the ends are those of the model's own rule, a `SigmaGrid`. Pure: numpy
only; no torch, no I/O, no randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ditserve.model.spec.diffusion import FloatTable, NoiseProcess, RectifiedFlow
from ditserve.model.spec.sigma_grids import SPACINGS

# The steps of the grid that is followed where it is not said, more than any sample takes.
FINE = 1000


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


def flow_grid(kind: str, steps: int, flow: RectifiedFlow) -> tuple[float, ...]:
    """Return the N = `steps` decreasing sigmas that a sample of a flow visits before 0.

    "uniform" in 4 steps is 1, 0.75, 0.5, 0.25 where the flow shifts nothing. `kind` may also be a list of N
    sigmas, such as "1,0.8,0.4", which is taken as it is.

    Raises:
        ValueError: an unknown kind, steps outside 1..`max_steps`, or a list that is not as stated.
    """
    if not 1 <= steps <= flow.max_steps:
        raise ValueError(f"steps must be in 1..{flow.max_steps}, not {steps}")
    values = _sigmas(kind, steps, flow)
    if len(values) != steps:
        raise ValueError(f"the explicit grid has {len(values)} sigmas, but {steps} steps were asked for")
    return values


def flow_regrid(
    level: float, steps: int, kind: str, flow: RectifiedFlow, whole: int = FINE
) -> tuple[float, ...]:
    """Return `steps` sigmas, spaced as `kind` says, for a sample of a flow whose next one is `level`.

    The first is always `level`. From 0.6 on, 3 steps of "uniform" are 0.6, 0.4, 0.2 where the flow shifts
    nothing. The grid of `whole` steps is read as a curve down to 0, and the part of it below `level` is
    sampled evenly. So as many steps as the whole grid had left are these steps again.

    Raises:
        ValueError: a level outside 0..1, or 0; `steps` < 1; or an unknown kind.
    """
    if not 0.0 < level <= 1.0:
        raise ValueError(f"sigma must be above 0 and at most 1, not {level}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    curve = np.append(_sigmas(kind, whole, flow), 0.0)
    index = np.arange(curve.size, dtype=np.float64)
    reached = np.interp(-level, -curve, index)
    resampled = np.interp(np.linspace(reached, index[-1], steps + 1)[:-1], index, curve)
    return (float(level), *resampled[1:].tolist())


def _sigmas(kind: str, steps: int, flow: RectifiedFlow) -> tuple[float, ...]:
    """Return the sigmas of a named grid in so many steps, or those of a list."""
    spacing = next((name for name in SPACINGS if name == kind), None)
    if spacing is not None:
        return replace(flow.grid, spacing=spacing).sigmas(steps)
    try:
        values = [float(part) for part in kind.split(",")]
    except ValueError:
        names = ", ".join(SPACINGS)
        raise ValueError(f"grid of a flow must be {names} or comma-separated sigmas, not {kind!r}") from None
    return tuple(check_levels(values, flow).tolist())
