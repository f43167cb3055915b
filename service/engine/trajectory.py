"""The trajectory of one sample: the noise levels it walks, and the coefficients of the solver step at each.

A rung, a guidance scale and the noise level at which a sample stands give its trajectory. A step needs only
the coefficients, so samples with different solvers, grids and step counts advance together. Pure: no I/O, no
clock, no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.grids import noise_levels, noise_levels_from
from ditserve.model.spec.guidance import guidance_weight
from ditserve.model.spec.solvers import LEARNED, step_table, variance_bounds
from ditserve.model.spec.stretches import Stretch, stretch_at
from ditserve.service.rung import Rung

Floats = npt.NDArray[np.float32]


class StepCoefficients(NamedTuple):
    """The numbers of solver steps, a column of float32 for each name.

    A step is D = x0_x·x + x0_out·output, then x' = a·x + b·D + c·D' + d·D'' + s·z (see `model.spec.solvers`).
    `guidance_weight` is w of classifier-free guidance at this step; at 1 no unconditional row is needed.
    `log_low` and `log_high` bound the log variance of a network that learned it, which takes the place of s
    in a step of DDPM; they are -inf in the steps of other solvers.
    """

    x0_x: Floats
    x0_out: Floats
    a: Floats
    b: Floats
    c: Floats
    d: Floats
    s: Floats
    guidance_weight: Floats
    log_low: Floats
    log_high: Floats

    @property
    def learned(self) -> npt.NDArray[np.bool_]:
        """True in the steps for which a network may have learned the variance."""
        return np.isfinite(self.log_high)

    @classmethod
    def of_samples(cls, rows: Sequence[Floats], axes: int) -> StepCoefficients:
        """Return the columns for n samples whose latents have so many axes: (n, 1, 1, 1) for (C, H, W).

        `rows` has the row (10,) of each one's next step.
        """
        columns = np.stack(rows, axis=1)  # (10, n)
        return cls(*columns.reshape(len(columns), -1, *(1,) * axes))


class Trajectory:
    """The steps of one sample, immutable and shared by samples that walk alike.

    `rows` is (N, 10) float32: the coefficients of step i, in the order of `StepCoefficients`. `guided[i]` is
    true where step i needs an unconditional row as well. `backbones[i]` names the network of step i, whose
    rows cost `row_costs[i]`. `noise[i]` is its level's share of the noise range, and `told[i]` the bits of
    the float32 that the network is told of it. `previous` is the level before the first step, where this
    trajectory continues another one. `alike[i]` counts the steps from i on that are of one backbone and have
    the same number of rows, and `since[i]` those before it.
    """

    __slots__ = (
        "alike",
        "backbones",
        "guided",
        "levels",
        "noise",
        "previous",
        "row_costs",
        "rows",
        "scale",
        "since",
        "told",
    )

    def __init__(
        self,
        levels: Sequence[float],
        schedule: Schedule,
        columns: StepCoefficients,
        *,
        stretches: Sequence[Stretch],
        scale: float,
        previous: float | None,
    ) -> None:
        self.levels = tuple(levels)
        self.noise = tuple(map(schedule.share, self.levels))
        self.told: tuple[int, ...] = tuple(schedule.told(self.levels).view(np.uint32).tolist())
        self.backbones = tuple(stretch.backbone for stretch in stretches)
        self.row_costs = tuple(stretch.row_cost for stretch in stretches)
        self.guided: tuple[bool, ...] = tuple((columns.guidance_weight != 1.0).tolist())
        kinds = list(zip(self.backbones, self.guided, strict=True))
        self.alike = _alike(kinds)
        self.since = tuple(count - 1 for count in reversed(_alike(kinds[::-1])))
        self.rows: Floats = np.stack(columns, axis=1)
        self.rows.setflags(write=False)
        self.scale = scale
        self.previous = previous

    def __len__(self) -> int:
        return len(self.levels)

    def rows_from(self, cursor: int, conditions: int = 1) -> float:
        """Return the rows of the steps from `cursor` to the end, at which `conditions` are composed.

        They count by their cost, in rows of the bundle's own backbone.
        """
        steps = zip(self.guided[cursor:], self.row_costs[cursor:], strict=True)
        return sum(row_cost * (conditions + guided) for guided, row_cost in steps)


def _alike(kinds: Sequence[tuple[str, bool]]) -> tuple[int, ...]:
    """Return for each step how many from it on are of its kind: (3, 2, 1, 1) for kinds a, a, a, b."""
    counts, following = list[int](), None
    for kind in reversed(kinds):
        counts.append(counts[-1] + 1 if kind == following else 1)
        following = kind
    return tuple(reversed(counts))


def make_trajectory(rung: Rung, scale: float, schedule: Schedule, *, area: float = 1.0) -> Trajectory:
    """Return the whole trajectory of a sample: from noise or, below full strength, from a picture.

    `scale` is its guidance scale, and `area` that of its rows, in rows of the model's own size.
    """
    levels = noise_levels(rung.grid, rung.steps, schedule.for_area(area))[-rung.walked :]
    return trajectory_from_levels(rung, scale, schedule, levels, previous=None)


def regrid_trajectory(
    rung: Rung, scale: float, schedule: Schedule, *, level: float, steps: int, previous: float | None
) -> Trajectory:
    """Return the rest of the way in `steps` steps on `rung`, for a sample at a noise level.

    They are fewer where there are not so many timesteps left. `previous` is the level of the estimate in the
    sample's solver history. With it a multistep solver keeps its order.
    """
    levels = noise_levels_from(level, steps, rung.grid, schedule, whole=rung.steps)
    return trajectory_from_levels(rung, scale, schedule, levels, previous=previous)


def trajectory_from_levels(
    rung: Rung, scale: float, schedule: Schedule, levels: Sequence[float], *, previous: float | None
) -> Trajectory:
    """Return the trajectory through `levels`, high to low; `previous` as in `regrid_trajectory`."""
    table = step_table(rung.solver, levels, schedule, previous=previous)
    interval, decay = rung.guidance_interval, rung.guidance_decay
    stretches = [stretch_at(rung.stretches, schedule.share(level)) for level in levels]
    weights = [
        guidance_weight(scale if stretch.guided else 1.0, level, schedule, interval, decay)
        for stretch, level in zip(stretches, levels, strict=True)
    ]
    if rung.solver == LEARNED:
        bounds = variance_bounds(levels, schedule)
    else:
        bounds = (np.full(len(table), -np.inf),) * 2
    _, *solver = table.columns
    columns = (*solver, weights, *bounds)
    coefficients = StepCoefficients(*(np.asarray(column, np.float32) for column in columns))
    return Trajectory(levels, schedule, coefficients, stretches=stretches, scale=scale, previous=previous)
