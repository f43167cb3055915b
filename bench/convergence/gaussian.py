"""The exact error of a sampling run on Gaussian data, whose best network has a closed form.

For data N(0, std²) the best estimate of the image is x · alpha · std² / (alpha² · std² + sigma²), so a step
is linear in x and in its noise. The covariance of x and of the last estimates therefore follows without
drawing a sample, and the error of a run is that of the standard deviation it ends with. It is a root mean
square over data of several standard deviations, relative to the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditserve.bench.convergence.trials import Trial
from ditserve.model.spec.diffusion import FloatTable, Schedule, training_target
from ditserve.model.spec.solvers import StepTable

STDS: FloatTable = np.array([0.125, 0.25, 0.5, 1.0, 2.0])


def run_error(trial: Trial, levels: Sequence[float], schedule: Schedule) -> float:
    """Return the error of the images of a whole run along `levels`, which starts from pure noise."""
    table = trial.table(levels, schedule)
    start = np.full(STDS.shape, float(schedule.sigma(levels[0])))
    return _error(_deviations(table, start, schedule, len(table)), STDS)


def inner_error(trial: Trial, levels: Sequence[float], schedule: Schedule) -> float:
    """Return the error on arrival at the last of `levels`, for samples that are exact at the first.

    Both ends of the noise range are left out: there a step is infinitely long in log(alpha / sigma), and no
    solver has its order.
    """
    table = trial.table(levels, schedule)
    start, end = (_marginal(schedule, levels[place]) for place in (0, -1))
    return _error(_deviations(table, start, schedule, len(table) - 1), end)


def measured_order(trial: Trial, schedule: Schedule, ends: tuple[float, float], steps: int) -> float:
    """Return the order between `steps` steps and half as many: log2 of the ratio of their errors."""
    coarse, fine = (
        inner_error(trial, np.linspace(*ends, count + 1).tolist(), schedule) for count in (steps // 2, steps)
    )
    return float(np.log2(coarse / fine))


def _error(drawn: FloatTable, exact: FloatTable) -> float:
    return float(np.sqrt(np.mean((drawn / exact - 1.0) ** 2)))


def _marginal(schedule: Schedule, level: float) -> FloatTable:
    return np.sqrt((schedule.alpha(level) * STDS) ** 2 + schedule.sigma(level) ** 2)


def _deviations(table: StepTable, start: FloatTable, schedule: Schedule, steps: int) -> FloatTable:
    """Return the standard deviations (M,) of x after so many steps of a table, from those at its start."""
    covariance = np.zeros((STDS.size, 3, 3))  # of x and of D in the last two steps
    covariance[:, 0, 0] = start**2
    for level, x0_x, x0_out, a, b, c, d, s in list(zip(*table.columns, strict=True))[:steps]:
        alpha, sigma = schedule.alpha(level), schedule.sigma(level)
        image = alpha * STDS**2 / (alpha**2 * STDS**2 + sigma**2)
        noise = (1.0 - alpha * image) / sigma
        output = schedule.output_sign * training_target(schedule.prediction, alpha, sigma, image, noise)
        estimate = x0_x + x0_out * output  # D of x = 1
        step = np.zeros_like(covariance)
        step[:, 0] = np.stack([a + b * estimate, np.full_like(estimate, c), np.full_like(estimate, d)], 1)
        step[:, 1, 0] = estimate
        step[:, 2, 1] = 1.0
        covariance = step @ covariance @ step.transpose(0, 2, 1)
        covariance[:, 0, 0] += s**2
    return np.sqrt(covariance[:, 0, 0])
