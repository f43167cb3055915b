"""Gaussian diffusion in discrete time: noise schedules, guidance, training formulas.

Everywhere x_t = alpha_t · x_0 + sigma_t · noise, where alpha² = alpha_bar and alpha² + sigma² = 1. Timestep 0
is the least noisy, T - 1 the noisiest, and CLEAN (-1) is the image itself.

Pure: numpy only; no torch, no I/O, no randomness. Tables are float64. Functions of samples are plain
arithmetic, so that they take numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

Prediction = Literal["epsilon", "v", "x0"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
FloatTable = npt.NDArray[np.float64]
Array = TypeVar("Array", bound=Any)  # a numpy array or a torch tensor

# The timestep of the image itself: alpha 1, sigma 0.
CLEAN = -1
# Keeps alpha_bar positive at the noisy end (Nichol & Dhariwal, arXiv:2102.09672, §3.2).
BETA_MAX = 0.999


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless `prediction` is one of PREDICTIONS."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, not {prediction!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A noise schedule: the share of the image left at every timestep, and what the network predicts.

    `alpha_bar` is float64 (T,), strictly decreasing inside (0, 1); it is copied and made read-only.

    Raises:
        ValueError: `alpha_bar` or `prediction` is not as stated.
    """

    alpha_bar: FloatTable
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        table = np.array(self.alpha_bar, dtype=np.float64)
        if table.ndim != 1 or table.size == 0:
            raise ValueError(f"alpha_bar must be a non-empty vector, not an array of shape {table.shape}")
        if not (np.all(table > 0.0) and np.all(table < 1.0) and np.all(np.diff(table) < 0.0)):
            raise ValueError("alpha_bar must decrease strictly inside (0, 1): use a milder schedule or shift")
        table.flags.writeable = False
        object.__setattr__(self, "alpha_bar", table)

    @property
    def timesteps(self) -> int:
        """The number T of noise levels that the network was trained on."""
        return int(self.alpha_bar.size)

    @property
    def alphas(self) -> FloatTable:
        """The signal scale alpha at every timestep, float64 (T,)."""
        return np.asarray(np.sqrt(self.alpha_bar))

    @property
    def sigmas(self) -> FloatTable:
        """The noise scale sigma at every timestep, float64 (T,)."""
        return np.asarray(np.sqrt(1.0 - self.alpha_bar))

    def alpha(self, t: int) -> float:
        """Return the signal scale at timestep `t`, 1.0 at CLEAN. Raise ValueError outside -1..T-1."""
        return math.sqrt(self._alpha_bar_at(t))

    def sigma(self, t: int) -> float:
        """Return the noise scale at timestep `t`, 0.0 at CLEAN. Raise ValueError outside -1..T-1."""
        return math.sqrt(1.0 - self._alpha_bar_at(t))

    def _alpha_bar_at(self, t: int) -> float:
        if t == CLEAN:
            return 1.0
        if not 0 <= t < self.timesteps:
            raise ValueError(f"timestep must be in -1..{self.timesteps - 1}, not {t}")
        return float(self.alpha_bar[t])


def _linear_betas(timesteps: int) -> FloatTable:
    # Ho et al., arXiv:2006.11239, §4 (1e-4 to 0.02 over 1000 steps), rescaled to T as in arXiv:2102.09672.
    scale = 1000.0 / timesteps
    return np.linspace(scale * 1e-4, scale * 2e-2, timesteps, dtype=np.float64)


def _cosine_betas(timesteps: int) -> FloatTable:
    # Nichol & Dhariwal, arXiv:2102.09672, eq. 17: alpha_bar(u) = cos²((u + 0.008) / 1.008 · pi/2).
    u = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    alpha_bar: FloatTable = np.cos((u + 0.008) / 1.008 * (np.pi / 2)) ** 2
    return 1.0 - alpha_bar[1:] / alpha_bar[:-1]


SCHEDULES: dict[str, Callable[[int], FloatTable]] = {"linear": _linear_betas, "cosine": _cosine_betas}


def make_schedule(
    kind: str, timesteps: int = 1000, *, prediction: Prediction = "epsilon", log_snr_shift: float = 0.0
) -> Schedule:
    """Build a noise schedule of `timesteps` >= 1 levels; `kind` is "linear" or "cosine".

    Betas are clipped to 0.999, so that alpha_bar stays positive at the noisy end. For a 1000-step cosine
    schedule it is 2.4e-9 there, and an error of an epsilon prediction becomes 20,000 times as large in x_0:
    clip x_0, or predict v or x0 instead. `log_snr_shift` (natural log, negative = noisier) is added to
    log(alpha²/sigma²) at every timestep; "simple diffusion" (Hoogeboom et al., arXiv:2301.11093, §3.1) uses
    2·log(64 / image size).

    Raises:
        ValueError: an unknown kind or prediction, `timesteps` < 1, or a shift that is not finite or so large
            that neighbouring noise levels become equal.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {kind!r}")
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, not {timesteps}")
    if not math.isfinite(log_snr_shift):
        raise ValueError(f"log_snr_shift must be finite, not {log_snr_shift}")
    alpha_bar: FloatTable = np.cumprod(
        1.0 - np.minimum(SCHEDULES[kind](timesteps), BETA_MAX), dtype=np.float64
    )
    if log_snr_shift:
        # A shift that is far too large drives alpha_bar to 0, which Schedule refuses.
        with np.errstate(over="ignore"):
            noise_to_signal = (1.0 - alpha_bar) / alpha_bar * np.exp(-log_snr_shift)
        alpha_bar = 1.0 / (1.0 + noise_to_signal)
    return Schedule(alpha_bar, prediction)


def guided(cond: Array, uncond: Array, scale: Any, channels: int | None = None) -> Array:
    """Return the output of classifier-free guidance, uncond + scale · (cond - uncond), as a new array.

    `cond` and `uncond` are outputs (..., C, H, W) of one shape; `scale` is a number or broadcasts against
    them, such as (B, 1, 1, 1). With `channels` = k in 0..C only the first k channels are guided and the
    others are those of `cond`: the published DiT guides 3 of 4. Source: Ho & Salimans, arXiv:2207.12598.
    """
    mixed: Array = uncond + scale * (cond - uncond)
    if channels is not None:
        mixed[..., channels:, :, :] = cond[..., channels:, :, :]
    return mixed


def guidance_weight(
    scale: float, t: int, timesteps: int, interval: tuple[float, float] = (0.0, 1.0), decay: float = 0.0
) -> float:
    """Return the guidance scale at timestep `t`: scale · exp(-decay · t / T), or 1.0 outside `interval`.

    `interval` is [low, high], inclusive, in fractions t / (T - 1) of the noise range (Kynkäänniemi et al.,
    arXiv:2404.07724). At weight 1.0 a sample needs no unconditional row. With a positive `decay` noisier
    samples are guided less, with a negative one more. For scale 4, T = 1000, interval (0.2, 0.8) and no
    decay, the weight is 4 at timestep 500 and 1 at timesteps 100 and 900.

    Raises:
        ValueError: an interval that is not 0 <= low <= high <= 1, `t` outside 0..T-1, or |decay| above 20.
    """
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"a guidance interval must satisfy 0 <= low <= high <= 1, not {interval}")
    if not 0 <= t < timesteps:
        raise ValueError(f"timestep must be in 0..{timesteps - 1}, not {t}")
    if not abs(decay) <= 20.0:
        raise ValueError(f"guidance decay must be in -20..20, not {decay}")
    if not low <= t / max(timesteps - 1, 1) <= high:
        return 1.0
    return float(scale) * math.exp(-decay * t / timesteps)


def forward_rows(
    levels: Sequence[int], timesteps: int, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> int:
    """Return the rows of one picture: two for a step at which guidance acts, one for any other.

    20 steps with guidance in an interval that holds 12 of them are 12 · 2 + 8 · 1 = 32 rows.
    """
    return sum(1 + (guidance_weight(scale, t, timesteps, interval) != 1.0) for t in levels)


def add_noise(alpha: Any, sigma: Any, x0: Array, noise: Array) -> Array:
    """Return x_t = alpha · x_0 + sigma · noise (arXiv:2006.11239, eq. 4); `alpha` and `sigma` broadcast."""
    noisy: Array = alpha * x0 + sigma * noise
    return noisy


def training_target(prediction: Prediction, alpha: Any, sigma: Any, x0: Array, noise: Array) -> Array:
    """Return the output to train towards: noise, x_0, or v = alpha · noise - sigma · x_0 (arXiv:2202.00512).

    `alpha` and `sigma` broadcast against the samples. Raise ValueError for an unknown prediction.
    """
    check_prediction(prediction)
    of_x0, of_noise = {"epsilon": (0.0, 1.0), "v": (-sigma, alpha), "x0": (1.0, 0.0)}[prediction]
    target: Array = of_x0 * x0 + of_noise * noise
    return target


def x0_coefficients(prediction: Prediction, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """Return (p, q) such that p · x_t + q · output estimates x_0; they are shaped as `alpha` > 0 and `sigma`.

    Raise ValueError for an unknown prediction.
    """
    check_prediction(prediction)
    coefficients = {"epsilon": (1.0 / alpha, -sigma / alpha), "v": (alpha, -sigma)}
    return coefficients.get(prediction, (0.0 * alpha, 1.0 + 0.0 * sigma))


def loss_weights(schedule: Schedule, space: Prediction, cap: float | None = None) -> FloatTable:
    """Return weights (T,) float64 that turn the squared error of the output into that of `space`.

    An error d of x_0 is an error d · alpha / sigma of epsilon and an error d / sigma of v
    (arXiv:2202.00512, §4). `cap` bounds the weight of the squared error of x_0: with "epsilon" it is the
    gamma of Min-SNR (arXiv:2303.09556), whatever the network predicts; with "v" that weight is
    min(1 / sigma², cap). Without a cap, a `space` equal to the prediction of the schedule gives all ones, the
    plain loss.

    Raises:
        ValueError: an unknown space, or a cap that is not positive.
    """
    if cap is not None and not cap > 0.0:
        raise ValueError(f"the weight cap must be positive, not {cap}")
    alpha, sigma = schedule.alphas, schedule.sigmas
    from_output = x0_coefficients(schedule.prediction, alpha, sigma)[1] ** 2
    weight = 1.0 / x0_coefficients(space, alpha, sigma)[1] ** 2
    capped = weight if cap is None else np.minimum(weight, cap)
    return np.asarray(from_output * capped, dtype=np.float64)
