"""Training losses: the noise level of a row, the target of the network's output, and the error of the output.

The functions depend on their arguments alone. The loss of a run is the weighted squared error. The
variational and the embedding term are auxiliary: they shape the gradient, and are reported separately so that
losses of different runs can be compared.

    weight of x_0 error²    `loss_space`  `loss_cap`  SNR = alpha² / sigma²
    1 / sigma², at most c   "v"           c           1 / sigma² = SNR + 1: velocity, arXiv:2202.00512, §4
    min(SNR, gamma)         "epsilon"     gamma       Min-SNR-gamma (Hang et al., arXiv:2303.09556)
    SNR                     "epsilon"     none        the plain noise loss, arXiv:2006.11239, eq. 14
    max(SNR, f)             "epsilon"     none        `loss_floor` f = 1: truncated SNR, arXiv:2202.00512, §4
    1                       "x0"          none

    1 / sigma², at most c   "flow"        c           velocity of a flow, noise - x_0, whatever is predicted

An x_0 error d is an epsilon error of d · alpha / sigma, and a v or flow error of d / sigma, so each of these
works for every prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.model.nets.layers import along_rows
from ditserve.model.spec.diffusion import (
    Prediction,
    RectifiedFlow,
    Schedule,
    VariancePreserving,
    add_noise,
    loss_weights,
    training_target,
)
from ditserve.model.spec.solvers import learned_log_variance, variance_bounds

LevelSampling = Literal["uniform", "logit-normal"]
LN2 = math.log(2.0)
# Half the width of the bin of an 8-bit pixel in [−1, 1].
HALF_BIN = 1.0 / 255.0
# The largest weight of the x_0 error of a flow's network that predicts x_0: that of sigma 0.05.
FLOW_IMAGE_CAP = 400.0


@dataclass(frozen=True, slots=True, eq=False)
class RowNoise:
    """The noise of N rows, float32 on one device: the coefficients of each row at its own level.

    `told` (N,) is what the network is told. x_0 = x0_x · x_t + x0_out · output, with coefficients (N,), which
    `along_rows` spreads over the pixels. `weight` (N,) multiplies the squared error of the output. `sign` is
    that of the output.
    """

    prediction: Prediction
    sign: int
    told: Tensor
    alpha: Tensor
    sigma: Tensor
    x0_x: Tensor
    x0_out: Tensor
    weight: Tensor

    def noisy(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return x_t (N, C, H, W) of pictures and noise of that shape, or that of clips."""
        return add_noise(along_rows(self.alpha, x0), along_rows(self.sigma, x0), x0, noise)

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return what the output is trained towards, shaped as `x0`."""
        alpha, sigma = along_rows(self.alpha, x0), along_rows(self.sigma, x0)
        return self.sign * training_target(self.prediction, alpha, sigma, x0, noise)

    def image(self, x_t: Tensor, output: Tensor) -> Tensor:
        """Return the x_0 (N, C, H, W) that an output for `x_t` stands for."""
        return along_rows(self.x0_x, x_t) * x_t + along_rows(self.x0_out, x_t) * output


@dataclass(frozen=True, slots=True, eq=False)
class TrainingNoise:
    """A schedule, and the weight of the error at each of its levels, as in the table of this module."""

    schedule: Schedule
    space: Prediction
    cap: float | None = None
    floor: float = 0.0
    device: str | torch.device = "cpu"

    def at(self, levels: Tensor) -> RowNoise:
        """Return the noise of rows at levels (N,), computed in float64.

        Raises:
            ValueError: an unknown space, a cap that is not positive, or a level that the process lacks.
        """
        at, schedule = levels.cpu().double().numpy(), self.schedule
        x0_x, x0_out = schedule.x0_coefficients(at)
        weight = loss_weights(schedule, at, self.space, self.cap)
        columns = {"alpha": schedule.alpha(at), "sigma": schedule.sigma(at), "x0_x": x0_x, "x0_out": x0_out}
        return RowNoise(
            schedule.prediction,
            schedule.output_sign,
            told=self._rows(schedule.told(at)),
            weight=self._rows(np.maximum(weight, self.floor * x0_out**2)),
            **{name: self._rows(column) for name, column in columns.items()},
        )

    def _rows(self, column: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(column).float().to(self.device)


def default_space(schedule: Schedule) -> Prediction:
    """Return the quantity whose error is the loss unless a run says otherwise: epsilon, flow, or v."""
    if schedule.prediction == "epsilon":
        return "epsilon"
    return "flow" if isinstance(schedule.process, RectifiedFlow) else "v"


def training_noise(
    schedule: Schedule,
    *,
    space: Prediction | None = None,
    cap: float | None = None,
    floor: float = 0.0,
    device: str | torch.device = "cpu",
) -> TrainingNoise:
    """Return the noise of a run, with the defaults of `TrainConfig` for what is None."""
    image_of_flow = isinstance(schedule.process, RectifiedFlow) and schedule.prediction == "x0"
    cap = cap or (FLOW_IMAGE_CAP if image_of_flow else None)
    return TrainingNoise(schedule, space or default_space(schedule), cap, floor, device)


@dataclass(frozen=True, slots=True, eq=False)
class PosteriorTables:
    """The coefficients of q(x_{t−1} | x_t, x_0) by timestep; every tensor is float32 (T,), on one device.

    The mean is mean_x0 · x_0 + mean_x · x_t. A learned variance lies between log_low, the log of the
    posterior variance, and log_high, that of the forward process.
    """

    mean_x0: Tensor
    mean_x: Tensor
    log_low: Tensor
    log_high: Tensor

    @classmethod
    def of(cls, schedule: Schedule, device: str | torch.device = "cpu") -> PosteriorTables:
        """Compute the tables, in float64.

        Raises:
            ValueError: the schedule is no table of timesteps.
        """
        process = schedule.process
        if not isinstance(process, VariancePreserving):
            raise ValueError("a variance is learned on a table of timesteps")
        # alpha_bar at t − 1, and alpha_t = 1 − beta_t of arXiv:2006.11239.
        before = np.append(1.0, process.alpha_bar[:-1])
        step, sigma = process.alpha_bar / before, process.sigma(range(process.timesteps))
        low, high = variance_bounds(range(process.timesteps - 1, -1, -1), schedule)
        tables = {
            "mean_x0": np.sqrt(before) * (1.0 - step) / sigma**2,  # arXiv:2006.11239, eq. 7
            "mean_x": np.sqrt(step) * (1.0 - before) / sigma**2,
            "log_low": low[::-1].copy(),
            "log_high": high[::-1].copy(),
        }
        return cls(**{name: torch.from_numpy(table).float().to(device) for name, table in tables.items()})

    @property
    def timesteps(self) -> int:
        return len(self.mean_x)


def draw_levels(
    count: int,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    law: tuple[float, float] | None = None,
    shift: float = 1.0,
) -> Tensor:
    """Draw noise levels (count,) float64.

    They are uniform over the trained range, or with a `law` (mean, standard deviation) logit-normal, mostly
    of medium noise; a positive mean prefers the noisy side. A `shift` s moves a share u of the range to
    s · u / (1 + (s − 1) · u): above 1 to the noisy side. Source: Esser et al., arXiv:2403.03206, §3.
    """
    process = schedule.process
    if law is not None:
        mean, std = law
        share = torch.sigmoid(mean + std * torch.randn(count, generator=generator, dtype=torch.float64))
    elif isinstance(process, VariancePreserving):
        # The middle of each timestep's share.
        share = (torch.randint(process.timesteps, (count,), generator=generator) + 0.5) / process.span
    else:
        share = torch.rand(count, generator=generator, dtype=torch.float64)
    share = shift * share / (1.0 + (shift - 1.0) * share)
    return torch.from_numpy(process.trained_levels(share.double().numpy()))


def squared_error(row: RowNoise, output: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return the weighted squared error of each row, (N,).

    `output` is (N, C or 2·C, H, W); its first C channels are the prediction.
    """
    error = (output[:, : x0.shape[1]] - row.target(x0, noise)).square().flatten(1).mean(1)  # (N,)
    return error * row.weight


def variational_term(
    tables: PosteriorTables, row: RowNoise, output: Tensor, x0: Tensor, x_t: Tensor, levels: Tensor
) -> Tensor:
    """Return the term of the variational bound at timesteps `levels` (N,), in bits per dimension.

    It trains the variance. The term is KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)), and at t = 0 the
    negative log likelihood of 8-bit pixels. The mean is detached, so that only the variance channels
    `output[:, C:]` learn from it (Nichol & Dhariwal, arXiv:2102.09672, §3.1).
    """
    prediction, v = output[:, : x0.shape[1]].detach(), output[:, x0.shape[1] :]
    t = levels.long()
    mean_x0, mean_x = along_rows(tables.mean_x0[t], x0), along_rows(tables.mean_x[t], x0)
    low = along_rows(tables.log_low[t], x0)
    mean = mean_x0 * row.image(x_t, prediction) + mean_x * x_t
    log_variance = learned_log_variance(v, low, along_rows(tables.log_high[t], x0))
    divergence = gaussian_kl(mean_x0 * x0 + mean_x * x_t, low, mean, log_variance)
    likelihood = pixel_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(along_rows(t == 0, x0), -likelihood, divergence).flatten(1).mean(1) / LN2


def gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """Return KL(q ‖ p) of normal distributions, elementwise, in nats."""
    ratio = torch.exp(log_variance_q - log_variance_p)
    offset = (mean_q - mean_p).square() * torch.exp(-log_variance_p)
    return 0.5 * (log_variance_p - log_variance_q + ratio + offset - 1.0)


def pixel_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log probability, in nats, of the bin of half-width 1/255 around `x` in [−1, 1].

    The outermost bins reach to infinity. This is the decoder of Ho et al., arXiv:2006.11239, eq. 13. A
    probability below 1e-12 counts as 1e-12.
    """
    scale = torch.exp(-log_std)
    above, below = scale * (x + HALF_BIN - mean), scale * (x - HALF_BIN - mean)
    inner = (torch.special.ndtr(above) - torch.special.ndtr(below)).clamp(min=1e-12).log()
    edges = torch.where(x > 0.999, torch.special.log_ndtr(-below), inner)
    return torch.where(x < -0.999, torch.special.log_ndtr(above), edges)
