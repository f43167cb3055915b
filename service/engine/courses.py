"""A course: the steps one sample will walk, each one line of numbers.

A rung, a guidance scale and the noise level a sample stands at give its course; walking it needs only its lines, so
samples on different courses advance together. Pure: no I/O, no clock, no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Schedule, grid, guidance_weight, regrid
from ditserve.model.spec.solvers import step_table
from ditserve.service.rung import Rung

COLUMNS: Final = (
    "x0_x",
    "x0_out",
    "a",
    "b",
    "c",
    "s",
    "weight",
)  # of Course.lines; weight is the guidance weight


class Course:
    """Immutable. `lines` is (N, 7) float32 in the order of `COLUMNS`; `guided[i]`: step i needs a second row."""

    __slots__ = ("guided", "lines", "previous", "scale", "timesteps")

    def __init__(
        self, timesteps: Sequence[int], lines: npt.NDArray[np.float32], *, scale: float, previous: int | None
    ) -> None:
        self.timesteps = tuple(timesteps)
        lines.setflags(write=False)  # samples share it
        self.lines = lines
        self.guided: tuple[bool, ...] = tuple((lines[:, -1] != 1.0).tolist())
        self.scale = scale
        self.previous = previous

    def __len__(self) -> int:
        return len(self.timesteps)

    def rows_from(self, cursor: int) -> int:
        """Rows from step `cursor` to the end."""
        return len(self) - cursor + sum(self.guided[cursor:])


def plot(rung: Rung, scale: float, schedule: Schedule) -> Course:
    """The whole course of a sample that starts from noise."""
    steps = grid(rung.grid, rung.steps, schedule.timesteps)
    return along(rung, scale, schedule, steps, previous=None)


def replot(
    rung: Rung, scale: float, schedule: Schedule, *, timestep: int, steps: int, previous: int | None
) -> Course:
    """The rest of the way for a sample that stands at noise level `timestep`, in `steps` steps on `rung`.

    `previous` is the timestep of the estimate in its solver history: multistep solvers keep their order.
    """
    rest = regrid(timestep, steps, rung.grid, schedule.timesteps)
    return along(rung, scale, schedule, rest, previous=previous)


def along(
    rung: Rung, scale: float, schedule: Schedule, steps: Sequence[int], *, previous: int | None
) -> Course:
    """The course through given timesteps, high to low; `previous` as in `replot`."""
    table = step_table(rung.solver, steps, schedule, previous=previous)
    weight = [guidance_weight(scale, t, schedule.timesteps, rung.guidance_interval) for t in steps]
    columns = (table.x0_x, table.x0_out, table.a, table.b, table.c, table.s, weight)
    lines = np.stack(columns, axis=1, dtype=np.float32, casting="same_kind")
    return Course(steps, lines, scale=scale, previous=previous)
