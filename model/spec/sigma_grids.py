"""Grids of a flow model: the decreasing sigmas of a sample, by the rules of the models people serve.

A line from 1 to 0 is shifted towards noise, more for larger images, stretched to end at a given sigma, and
spaced anew between its ends. `model.spec.scheduler_config` reads all of it from files of diffusers. Pure:
numpy only; no torch, no I/O, no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]
Spacing = Literal["uniform", "karras", "exponential", "beta"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


@dataclass(frozen=True, slots=True)
class DynamicShift:
    """A shift that follows from the number of tokens of an image, and for "flux2" from that of steps too.

    Its logarithm mu is linear in the tokens: `base_shift` at `base_tokens` and `max_shift` at `max_tokens`
    (FLUX, arXiv:2403.03206, §5.3.2). For `kind` "linear" the shift is mu itself. For "flux2" mu is fitted to
    tokens and steps, as FLUX.2 does it, and the four numbers are not used.
    """

    kind: Literal["exponential", "linear", "flux2"] = "exponential"
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def shift(self, tokens: int, steps: int) -> float:
        """Return the shift of an image of `tokens` tokens in `steps` steps.

        Raises:
            ValueError: it is not positive, which "linear" may be for few tokens.
        """
        if self.kind == "flux2":
            return math.exp(_flux2_mu(tokens, steps))
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        shift = mu if self.kind == "linear" else math.exp(mu)
        if not 0.0 < shift < math.inf:
            raise ValueError(
                f"base_shift and max_shift give {tokens} tokens the shift {shift:g}, not above 0"
            )
        return shift


def _flux2_mu(tokens: int, steps: int) -> float:
    """Return mu of FLUX.2: linear in the tokens at 10 and at 200 steps, and in the steps between."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190.0 * (steps - 200)


@dataclass(frozen=True, slots=True)
class SigmaGrid:
    """The rule that gives the sigmas of any number of steps. It makes them in this order:

        a line from `first` to `last`; `last` is one of the sigmas if `reaches_last`, else the end after them
        the shift s, s · sigma / (1 + (s - 1) · sigma), which is `shift` or that of `dynamic`
        the stretch that brings the last sigma to `terminal`, if that is set
        the `spacing` between the first and the last of these sigmas, where it is not "uniform"
        `highest` in place of a sigma above it

    In 4 steps the default gives 1, 0.75, 0.5, 0.25, and with a shift of 3 it gives 1, 0.9, 0.75, 0.5.
    `tokens` is the number of tokens of an image of the model's own size, which a dynamic shift asks for.

    Raises:
        ValueError: a field is not as stated, or there are no tokens for a dynamic shift.
    """

    # For manifests and recipes: a field that is spelled wrongly is refused.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    spacing: Spacing = "uniform"
    shift: float = 1.0
    dynamic: DynamicShift | None = None
    terminal: float | None = None
    first: float = 1.0
    last: float = 0.0
    reaches_last: bool = False
    highest: float = 1.0
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {self.spacing!r}")
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift must be above 0, not {self.shift:g}")
        if self.terminal is not None and not 0.0 < self.terminal < 1.0:
            raise ValueError(f"terminal must be between 0 and 1, not {self.terminal:g}")
        if not 0.0 <= self.last < self.first <= 1.0 or (self.reaches_last and self.last == 0.0):
            raise ValueError(
                f"first and last must decrease inside 0..1, not {self.first:g} and {self.last:g}"
            )
        if not 0.0 < self.highest <= 1.0:
            raise ValueError(f"highest must be above 0 and at most 1, not {self.highest:g}")
        if self.dynamic is not None and self.tokens < 1:
            raise ValueError(f"tokens of an image must be at least 1 for a dynamic shift, not {self.tokens}")

    def for_area(self, share: float) -> SigmaGrid:
        """Return the rule for images of `share` times the tokens of the model's own size."""
        return replace(self, tokens=round(self.tokens * share)) if self.dynamic else self

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """Return the N = `steps` sigmas that a sample visits before 0.

        Raises:
            ValueError: fewer steps than 1, or a dynamic shift that is not positive.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        shift = self.shift if self.dynamic is None else self.dynamic.shift(self.tokens, steps)
        line = np.linspace(self.first, self.last, steps + (not self.reaches_last))[:steps]
        sigmas = shifted(line, shift)
        # A single step starts from noise, so it cannot end at `terminal` as well.
        if self.terminal is not None and steps > 1:
            sigmas = 1.0 - (1.0 - sigmas) * (1.0 - self.terminal) / (1.0 - sigmas[-1])
        if self.spacing != "uniform":
            ends = float(sigmas[0]), float(sigmas[-1])
            sigmas = _SPACED[self.spacing](*ends, np.linspace(0.0, 1.0, steps))
            # Free of rounding: at sigma 1 there is no image at all.
            sigmas[-1], sigmas[0] = ends[1], ends[0]
        return tuple(np.minimum(sigmas, self.highest).tolist())


UNSHIFTED = SigmaGrid()


def shifted(sigma: Any, shift: float) -> Any:
    """Return one or more sigmas moved by `shift`, above 1 towards noise: s · sigma / (1 + (s - 1) · sigma).

    Source: Esser et al., arXiv:2403.03206, eq. 23.
    """
    return shift * sigma / (shift * sigma + (1.0 - sigma))


def _karras(first: float, last: float, u: _Floats) -> _Floats:
    # Karras et al., arXiv:2206.00364, eq. 5, rho = 7.
    return np.asarray((first ** (1 / 7) + u * (last ** (1 / 7) - first ** (1 / 7))) ** 7)


def _exponential(first: float, last: float, u: _Floats) -> _Floats:
    return np.exp(math.log(first) + u * (math.log(last) - math.log(first)))


def _beta(first: float, last: float, u: _Floats) -> _Floats:
    # Lee et al., arXiv:2407.12173: quantiles of the beta distribution with both parameters 0.6.
    return last + (first - last) * beta_quantile(1.0 - u, 0.6)


_SPACED: Mapping[str, Callable[[float, float, _Floats], _Floats]] = MappingProxyType(
    {"karras": _karras, "exponential": _exponential, "beta": _beta}
)


def beta_quantile(share: _Floats, a: float) -> _Floats:
    """Return the quantiles of the beta distribution with both parameters `a`, for shares in 0..1.

    It is symmetric, so the lower half is enough. There the distribution function is x^a · sum of
    (1 - a)_k · x^k / (k! · (a + k)) over B(a, a), and bisection inverts it.
    """
    lower = np.minimum(share, 1.0 - share)
    k = np.arange(60, dtype=np.float64)
    terms = np.cumprod(np.append(1.0, (k[:-1] + 1.0 - a) / (k[:-1] + 1.0))) / (a + k)
    norm = math.gamma(a) ** 2 / math.gamma(2.0 * a)
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(60):
        x = 0.5 * (low + high)
        below = x**a * np.polynomial.polynomial.polyval(x, terms) / norm < lower
        low, high = np.where(below, x, low), np.where(below, high, x)
    x = 0.5 * (low + high)
    return np.where(share <= 0.5, x, 1.0 - x)
