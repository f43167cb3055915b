"""Gaussian diffusion: noise processes, and what a network predicts of them.

A sample at a noise level is x = alpha · x_0 + sigma · noise. A process says what alpha and sigma are at each
of its levels, which are real numbers; nothing else assumes that alpha² + sigma² = 1.

Pure: numpy only; no torch, no I/O, no randomness. Tables are float64. Functions of samples are plain
arithmetic, so that they take numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.sigma_grids import UNSHIFTED, SigmaGrid

Prediction = Literal["epsilon", "v", "x0", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
NoiseInput = Literal["timestep", "sigma", "1-sigma"]
FloatTable = npt.NDArray[np.float64]
Levels = float | Sequence[float] | npt.NDArray[Any]
Array = TypeVar("Array", bound=Any)  # a numpy array or a torch tensor

# The timestep of the image itself: alpha 1, sigma 0.
CLEAN = -1
# Keeps alpha_bar positive at the noisy end (Nichol & Dhariwal, arXiv:2102.09672, §3.2).
BETA_MAX = 0.999
# The least sigma that a flow is trained at: at 0 there is no noise to tell from the image.
MIN_SIGMA = 1e-4


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless `prediction` is one of PREDICTIONS."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, not {prediction!r}")


class NoiseProcess(Protocol):
    """The scales of signal and noise at every level, from `clean`, the image itself, up to `noisiest`.

    level / noisiest is the share of the noise range that guidance intervals count in, and level / span the
    time that a decay of guidance counts in. A sampling run has at most `max_steps` steps.
    """

    @property
    def clean(self) -> float: ...
    @property
    def noisiest(self) -> float: ...
    @property
    def span(self) -> float: ...
    @property
    def max_steps(self) -> int: ...

    def trained_levels(self, share: Levels) -> FloatTable:
        """Return the levels at shares 0..1 of the range that a network is trained on, clean to noisy."""

    def alpha(self, levels: Levels) -> FloatTable:
        """Return the signal scale at levels of any shape. Raise ValueError outside clean..noisiest."""

    def sigma(self, levels: Levels) -> FloatTable:
        """Return the noise scale at levels of any shape. Raise ValueError outside clean..noisiest."""


@dataclass(frozen=True, slots=True, eq=False)
class VariancePreserving:
    """A table of timesteps with alpha² + sigma² = 1: 0 is the least noisy, T - 1 the noisiest.

    `alpha_bar` = alpha² is float64 (T,), strictly decreasing inside (0, 1); it is copied and made read-only.
    Between two timesteps log(alpha / sigma) is interpolated linearly. CLEAN is the image.

    Raises:
        ValueError: `alpha_bar` is not as stated.
    """

    alpha_bar: FloatTable
    clean: ClassVar[float] = float(CLEAN)

    def __post_init__(self) -> None:
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
    def noisiest(self) -> float:
        return self.timesteps - 1.0

    @property
    def span(self) -> float:
        return float(self.timesteps)

    @property
    def max_steps(self) -> int:
        return self.timesteps

    def trained_levels(self, share: Levels) -> FloatTable:
        return np.minimum(np.floor(np.asarray(share, dtype=np.float64) * self.timesteps), self.noisiest)

    def alpha(self, levels: Levels) -> FloatTable:
        return np.sqrt(self._alpha_bar_at(levels))

    def sigma(self, levels: Levels) -> FloatTable:
        return np.sqrt(1.0 - self._alpha_bar_at(levels))

    def _alpha_bar_at(self, levels: Levels) -> FloatTable:
        t = np.asarray(levels, dtype=np.float64)
        if not np.all(((t >= 0.0) & (t <= self.noisiest)) | (t == CLEAN)):
            raise ValueError(f"timestep must be -1 or in 0..{self.timesteps - 1}, not {levels}")
        # CLEAN is the index of the last entry.
        at_timesteps = np.append(self.alpha_bar, 1.0)[np.floor(t).astype(np.int64)]
        if np.all(t == np.floor(t)):
            return at_timesteps[()]
        log_snr = np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)
        between = 1.0 / (1.0 + np.exp(-np.interp(t, np.arange(self.timesteps), log_snr)))
        return np.where(t == np.floor(t), at_timesteps, between)[()]


@dataclass(frozen=True, slots=True)
class RectifiedFlow:
    """The straight line from image to noise: the level is sigma in 0..1, and alpha is 1 - sigma.

    `grid` is the model's own rule of its grids, on which a sample takes at most `max_steps` steps.
    Source: Liu et al., arXiv:2209.03003; Lipman et al., arXiv:2210.02747.
    """

    max_steps: int = 1000
    grid: SigmaGrid = UNSHIFTED
    clean: ClassVar[float] = 0.0
    noisiest: ClassVar[float] = 1.0
    span: ClassVar[float] = 1.0

    def trained_levels(self, share: Levels) -> FloatTable:
        return np.maximum(np.asarray(share, dtype=np.float64), MIN_SIGMA)

    def alpha(self, levels: Levels) -> FloatTable:
        return 1.0 - self.sigma(levels)

    def sigma(self, levels: Levels) -> FloatTable:
        sigma = np.asarray(levels, dtype=np.float64)
        if not np.all((sigma >= 0.0) & (sigma <= 1.0)):
            raise ValueError(f"sigma must be in 0..1, not {levels}")
        # A scalar of a scalar: torch does not multiply with an array of no dimensions.
        return sigma[()]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A noise process, and how a network speaks of it: what it is told, and what it predicts.

    A network is told its noise level times `noise_scale`: a timestep, sigma, or 1 - sigma. Sigma is rounded
    down to one of `noise_timesteps` if these are given, as some schedulers of diffusers do. `output_sign` is
    -1 for a network whose output is the negative of its prediction. `step_counts` are the numbers of steps
    that a distilled network was trained for; empty: any.

    Raises:
        ValueError: a prediction, input, scale or sign that is unknown, or that the process does not have.
    """

    process: NoiseProcess
    prediction: Prediction = "epsilon"
    noise_input: NoiseInput = "timestep"
    noise_scale: float = 1.0
    output_sign: Literal[1, -1] = 1
    step_counts: tuple[int, ...] = ()
    noise_timesteps: int | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        flow = isinstance(self.process, RectifiedFlow)
        inputs = ("sigma", "1-sigma") if flow else ("timestep",)
        if self.noise_input not in inputs:
            kind = "a flow" if flow else "a table of timesteps"
            raise ValueError(f"noise_input of {kind} must be {' or '.join(inputs)}, not {self.noise_input!r}")
        if flow and self.prediction == "epsilon":
            raise ValueError("prediction of a flow must be flow, v or x0: at sigma 1 epsilon tells no image")
        if not 0.0 < self.noise_scale < math.inf:
            raise ValueError(f"noise_scale must be positive, not {self.noise_scale}")
        if self.output_sign not in (1, -1):
            raise ValueError(f"output_sign must be 1 or -1, not {self.output_sign}")

    @property
    def max_steps(self) -> int:
        """The most steps of a sampling run."""
        return self.process.max_steps

    def check_steps(self, steps: int) -> None:
        """Raise ValueError unless a run from noise may have so many steps."""
        if self.step_counts and steps not in self.step_counts:
            counts = ", ".join(map(str, sorted(self.step_counts)))
            raise ValueError(f"this model was trained for runs of {counts} steps, not {steps}")
        if not 1 <= steps <= self.max_steps:
            raise ValueError(f"steps must be in 1..{self.max_steps}, not {steps}")

    def for_area(self, share: float) -> Schedule:
        """Return the schedule of images of `share` times the model's own area, whose grids may be others."""
        flow = self.process
        if not isinstance(flow, RectifiedFlow) or flow.grid.dynamic is None or share == 1.0:
            return self
        return replace(self, process=replace(flow, grid=flow.grid.for_area(share)))

    def alpha(self, levels: Levels) -> FloatTable:
        """Return the signal scale at levels of any shape, 1 at the image itself."""
        return self.process.alpha(levels)

    def sigma(self, levels: Levels) -> FloatTable:
        """Return the noise scale at levels of any shape, 0 at the image itself."""
        return self.process.sigma(levels)

    def share(self, level: float) -> float:
        """Return where a level stands in the noise range, 0..1: t / (T - 1), or sigma."""
        return level / (self.process.noisiest or 1.0)

    def told(self, levels: Levels) -> npt.NDArray[np.float32]:
        """Return what the network is told of levels, float32."""
        level = np.asarray(levels, dtype=np.float64)
        if self.noise_timesteps is not None:
            level = np.floor(level * self.noise_timesteps) / self.noise_timesteps
        level = 1.0 - level if self.noise_input == "1-sigma" else level
        return np.asarray(self.noise_scale * level, dtype=np.float32)

    def share_told(self, told: npt.NDArray[Any]) -> FloatTable:
        """Return where the levels that a network is told as `told` stand in the noise range, 0..1."""
        level = np.asarray(told, dtype=np.float64) / self.noise_scale
        level = 1.0 - level if self.noise_input == "1-sigma" else level
        return level / (self.process.noisiest or 1.0)

    def x0_coefficients(self, levels: Levels) -> tuple[FloatTable, FloatTable]:
        """Return (p, q) at levels of any shape: p · x + q · output estimates x_0."""
        p, q = x0_coefficients(self.prediction, self.alpha(levels), self.sigma(levels))
        return p, self.output_sign * q


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


def variance_preserving(kind: str, timesteps: int = 1000, log_snr_shift: float = 0.0) -> VariancePreserving:
    """Build a process of `timesteps` >= 1 levels; `kind` is "linear" or "cosine".

    Betas are clipped to 0.999, so that alpha_bar stays positive at the noisy end. For a 1000-step cosine
    schedule it is 2.4e-9 there, and an error of an epsilon prediction becomes 20,000 times as large in x_0:
    clip x_0, or predict v or x0 instead. `log_snr_shift` (natural log, negative = noisier) is added to
    log(alpha²/sigma²) at every timestep; "simple diffusion" (Hoogeboom et al., arXiv:2301.11093, §3.1) uses
    2·log(64 / image size).

    Raises:
        ValueError: an unknown kind, `timesteps` < 1, or a shift that is not finite or so large
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
    return VariancePreserving(alpha_bar)


def make_schedule(
    kind: str, timesteps: int = 1000, *, prediction: Prediction = "epsilon", log_snr_shift: float = 0.0
) -> Schedule:
    """Build the schedule of a network that is told its timestep, on a `variance_preserving` process."""
    return Schedule(variance_preserving(kind, timesteps, log_snr_shift), prediction)


def add_noise(alpha: Any, sigma: Any, x0: Array, noise: Array) -> Array:
    """Return x_t = alpha · x_0 + sigma · noise (arXiv:2006.11239, eq. 4); `alpha` and `sigma` broadcast."""
    noisy: Array = alpha * x0 + sigma * noise
    return noisy


def training_target(prediction: Prediction, alpha: Any, sigma: Any, x0: Array, noise: Array) -> Array:
    """Return the prediction to train towards.

    It is the noise, x_0, v = alpha · noise - sigma · x_0 (arXiv:2202.00512), or the velocity of a flow,
    noise - x_0. `alpha` and `sigma` broadcast against the samples. Raise ValueError for another one.
    """
    check_prediction(prediction)
    pairs = {"epsilon": (0.0, 1.0), "v": (-sigma, alpha), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}
    of_x0, of_noise = pairs[prediction]
    target: Array = of_x0 * x0 + of_noise * noise
    return target


def x0_coefficients(prediction: Prediction, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """Return (p, q) such that p · x + q · prediction estimates x_0; they are shaped as `alpha` and `sigma`.

    `alpha` must be positive for "epsilon": pure noise that is known exactly tells nothing of the image.
    Raise ValueError for an unknown prediction.
    """
    check_prediction(prediction)
    if prediction == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction == "v":
        power = _exact_one(alpha * alpha + sigma * sigma)
        return alpha / power, -sigma / power
    if prediction == "flow":
        total = _exact_one(alpha + sigma)
        return 1.0 / total, -sigma / total
    return 0.0 * alpha, 1.0 + 0.0 * sigma


def _exact_one(value: Any) -> Any:
    """Return `value` with what is 1 but for rounding set to 1."""
    return value + (1.0 - value) * (abs(value - 1.0) < 1e-12)


def loss_weights(
    schedule: Schedule, levels: Levels, space: Prediction, cap: float | None = None
) -> FloatTable:
    """Return weights (N,) float64 that turn squared errors of the output at N levels into those of `space`.

    An error d of x_0 is an error d · alpha / sigma of epsilon, and an error d / sigma of v (arXiv:2202.00512,
    §4) and of the velocity of a flow. `cap` bounds the weight of the squared error of x_0: with "epsilon" it
    is the gamma of Min-SNR (arXiv:2303.09556), whatever the network predicts; with "v" that weight is
    min(1 / sigma², cap). Without a cap, a `space` equal to the prediction of the schedule gives all ones, the
    plain loss.

    Raises:
        ValueError: an unknown space, or a cap that is not positive.
    """
    if cap is not None and not cap > 0.0:
        raise ValueError(f"the weight cap must be positive, not {cap}")
    alpha, sigma = schedule.alpha(levels), schedule.sigma(levels)
    from_output = x0_coefficients(schedule.prediction, alpha, sigma)[1] ** 2
    with np.errstate(divide="ignore"):
        weight = 1.0 / x0_coefficients(space, alpha, sigma)[1] ** 2
    capped = weight if cap is None else np.minimum(weight, cap)
    return np.asarray(from_output * capped, dtype=np.float64)
