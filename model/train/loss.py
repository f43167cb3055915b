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

An x_0 error d is an epsilon error of d · alpha / sigma and a v error of d / sigma, so each of these works for
every prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ditserve.model.spec.diffusion import Prediction, Schedule, loss_weights, training_target, x0_coefficients
from ditserve.model.spec.solvers import learned_log_variance, variance_bounds

TimestepSampling = Literal["uniform", "logit-normal"]
LN2 = math.log(2.0)
# Half the width of the bin of an 8-bit pixel in [−1, 1].
HALF_BIN = 1.0 / 255.0


@dataclass(frozen=True, slots=True, eq=False)
class NoiseTables:
    """The coefficients that the losses look up by timestep; every tensor is float32 (T,), on one device.

    x_0 = x0_x · x_t + x0_out · output, and the posterior mean is mean_x0 · x_0 + mean_x · x_t. A learned
    variance lies between log_low, the log of the posterior variance, and log_high, that of the forward
    process. `weight` multiplies the squared error of the output.
    """

    prediction: Prediction
    alpha: Tensor
    sigma: Tensor
    weight: Tensor
    x0_x: Tensor
    x0_out: Tensor
    mean_x0: Tensor
    mean_x: Tensor
    log_low: Tensor
    log_high: Tensor

    @property
    def timesteps(self) -> int:
        return len(self.alpha)


def noise_tables(
    schedule: Schedule,
    space: Prediction,
    cap: float | None = None,
    device: str | torch.device = "cpu",
    *,
    floor: float = 0.0,
) -> NoiseTables:
    """Compute the tables of a schedule, in float64.

    `space`, `cap` and `floor` give the weight of the error as in the table of this module.

    Raises:
        ValueError: an unknown space, or a cap that is not positive.
    """
    alpha, sigma = schedule.alphas, schedule.sigmas
    # alpha_bar at t − 1, and alpha_t = 1 − beta_t of arXiv:2006.11239.
    before = np.append(1.0, schedule.alpha_bar[:-1])
    step = schedule.alpha_bar / before
    x0_x, x0_out = x0_coefficients(schedule.prediction, alpha, sigma)
    low, high = variance_bounds(range(schedule.timesteps - 1, -1, -1), schedule)
    tables = {
        "alpha": alpha,
        "sigma": sigma,
        "weight": np.maximum(loss_weights(schedule, space, cap), floor * x0_out**2),
        "x0_x": x0_x,
        "x0_out": x0_out,
        "mean_x0": np.sqrt(before) * (1.0 - step) / sigma**2,  # arXiv:2006.11239, eq. 7
        "mean_x": np.sqrt(step) * (1.0 - before) / sigma**2,
        "log_low": low[::-1].copy(),
        "log_high": high[::-1].copy(),
    }
    return NoiseTables(
        schedule.prediction,
        **{name: torch.from_numpy(table).float().to(device) for name, table in tables.items()},
    )


def uniform_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps (count,) int64, each of 0..T−1 with the same probability."""
    return torch.randint(timesteps, (count,), generator=generator)


def logit_normal_timesteps(
    count: int, timesteps: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Draw timesteps (count,) int64, floor(T · sigmoid(mean + std · z)), mostly of medium noise.

    A positive `mean` prefers the noisy side. Source: Esser et al., arXiv:2403.03206, §3.1.
    """
    u = torch.sigmoid(mean + std * torch.randn(count, generator=generator, dtype=torch.float64))
    return (u * timesteps).long().clamp(max=timesteps - 1)


def squared_error(tables: NoiseTables, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the weighted squared error of each row, (N,).

    `output` is (N, C or 2·C, H, W); its first C channels are the prediction.
    """
    alpha, sigma = per_row(tables.alpha, t), per_row(tables.sigma, t)
    target = training_target(tables.prediction, alpha, sigma, x0, noise)
    error = (output[:, : x0.shape[1]] - target).square().flatten(1).mean(1)  # (N,)
    return error * tables.weight[t]


def variational_term(tables: NoiseTables, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the term of the variational bound at timestep t, (N,), in bits per dimension.

    It trains the variance. The term is KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)), and at t = 0 the
    negative log likelihood of 8-bit pixels. The mean is detached, so that only the variance channels
    `output[:, C:]` learn from it (Nichol & Dhariwal, arXiv:2102.09672, §3.1).
    """
    prediction, v = output[:, : x0.shape[1]].detach(), output[:, x0.shape[1] :]
    estimate = per_row(tables.x0_x, t) * x_t + per_row(tables.x0_out, t) * prediction
    mean_x0, mean_x = per_row(tables.mean_x0, t), per_row(tables.mean_x, t)
    low = per_row(tables.log_low, t)
    mean = mean_x0 * estimate + mean_x * x_t
    log_variance = learned_log_variance(v, low, per_row(tables.log_high, t))
    divergence = gaussian_kl(mean_x0 * x0 + mean_x * x_t, low, mean, log_variance)
    likelihood = pixel_log_likelihood(x0, mean, 0.5 * log_variance)
    at_zero = (t == 0).view(-1, *[1] * (x0.ndim - 1))
    return torch.where(at_zero, -likelihood, divergence).flatten(1).mean(1) / LN2


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


def per_row(table: Tensor, t: Tensor) -> Tensor:
    """Return a table's entries at timesteps (N,), shaped to broadcast against (N, C, H, W)."""
    return table[t].view(-1, 1, 1, 1)
