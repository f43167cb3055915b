"""The solvers that are compared, and Heun's method, which is measured here and served nowhere.

A trial makes a table for a grid. A line of a table is one call of the network, so the length of the table is
its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.solvers import SOLVERS, StepTable, step_table

HEUN = "heun"


@dataclass(frozen=True, slots=True)
class Trial:
    """A solver with its share of ancestral noise, and the order of its error in the length of a step.

    Of a stochastic solver it is the order of what it draws in distribution, not of one path.
    """

    solver: str
    order: int
    eta: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.solver}, eta {self.eta:g}" if self.eta else self.solver

    def table(self, levels: Sequence[float], schedule: Schedule) -> StepTable:
        """Return the steps along a grid of `schedule`."""
        if self.solver == HEUN:
            return heun_table(levels, schedule)
        return step_table(self.solver, levels, schedule, eta=self.eta)

    def grid_steps(self, calls: int) -> int:
        """Return the steps of the longest grid that `calls` calls of the network afford."""
        return (calls + 1) // 2 if self.solver == HEUN else calls


TRIALS = (
    Trial("ddim", 1),
    Trial("euler", 1),
    Trial("ddpm", 1),
    Trial("dpmpp-2m", 2),
    Trial("dpmpp-2m", 2, eta=1.0),
    Trial("unipc-1", 2),
    Trial("unipc-2", 3),
    Trial(HEUN, 2),
)


def heun_table(levels: Sequence[float], schedule: Schedule) -> StepTable:
    """Return the 2 N - 1 lines of Heun's method along a grid of N levels.

    Every level but the first has two lines. After an Euler step to a level, the first line goes back and
    takes the step again, with the mean of the slopes at both of its ends; the second line is the next Euler
    step. The slope is that of x / (alpha + sigma) over sigma / (alpha + sigma), which for a flow is the
    velocity (Karras et al., arXiv:2206.00364, algorithm 1, as diffusers' FlowMatchHeunDiscreteScheduler has
    it).
    """
    euler = step_table("euler", levels, schedule)
    alpha, sigma = schedule.alpha(levels), schedule.sigma(levels)
    total = alpha + sigma
    share = sigma / total
    # D at the end of a step less D at its start, times this, is what the mean slope changes.
    change = total[1:] * (share[:-1] - share[1:]) / (2.0 * share[1:])
    n = len(levels)
    predicts = np.arange(2 * n - 1) % 2 == 0
    level, a, b, c = (np.zeros(2 * n - 1) for _ in range(4))
    level[predicts], level[~predicts] = euler.level, euler.level[1:]
    a[predicts], a[~predicts] = euler.a, 1.0
    b[predicts], b[~predicts] = euler.b, change
    c[~predicts] = -change
    x0_x, x0_out = schedule.x0_coefficients(level)
    return StepTable(
        solver=HEUN,
        level=level,
        x0_x=x0_x,
        x0_out=x0_out,
        a=a,
        b=b,
        c=c,
        d=np.zeros_like(level),
        s=np.zeros_like(level),
    )


assert {trial.solver for trial in TRIALS} == {*SOLVERS, HEUN}
