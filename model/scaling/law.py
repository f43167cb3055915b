"""The scaling law of a family of trained models, fitted to measured losses. Pure but for scipy's optimiser.

    L(N, D, T) = A·N^−α + B·D^−β + C·T^−γ + ε

N parameters, D different training pictures, T floating-point operations of training. Source: Hoffmann et al.,
arXiv:2203.15556, §3.3 and appendix D.2 ("approach 3"), there for N and D; the term of T is the gain from
training longer on the same pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize  # type: ignore[import-untyped]

Floats = npt.NDArray[np.float64]

VARIABLES = ("parameters", "pictures", "flops")
# Huber: residuals of the logarithm beyond this count linearly, as in the source.
DELTA = 1e-3
# Starting points of the search: the exponent of each variable, and the irreducible share of the smallest
# loss.
EXPONENTS = (0.2, 0.8)
SHARES = (0.2, 0.8)
LARGEST_EXPONENT = 5.0


@dataclass(frozen=True, slots=True)
class LossPoint:
    """A measured loss of one run; the points of one run are not independent of each other."""

    run: str
    parameters: float
    pictures: float
    flops: float
    loss: float


@dataclass(frozen=True, slots=True)
class LawTerm:
    """The term coefficient · (variable / origin)^−exponent.

    The origin lies amid the data, so that the coefficient has the magnitude of a loss.
    """

    coefficient: float
    exponent: float
    origin: float

    @property
    def plain(self) -> float:
        """The coefficient of variable^−exponent."""
        return float(self.coefficient * self.origin**self.exponent)


@dataclass(frozen=True, slots=True)
class Law:
    """The terms by variable; the effect of a variable that did not vary is part of `irreducible`."""

    terms: Mapping[str, LawTerm]
    irreducible: float

    def loss(self, **variables: npt.ArrayLike) -> Floats:
        """Return the loss at some `parameters`, `pictures` and `flops`, which broadcast."""
        loss = np.asarray(self.irreducible, np.float64)
        for name, term in self.terms.items():
            ratio = np.asarray(variables[name], np.float64) / term.origin
            loss = loss + term.coefficient * ratio**-term.exponent
        return loss

    def gains(self, point: LossPoint) -> dict[str, float]:
        """Return by how much the loss falls from `point` where one variable doubles and the others stay."""
        at = {name: getattr(point, name) for name in self.terms}
        return {name: float(self.loss(**at) - self.loss(**at | {name: 2 * at[name]})) for name in at}


def fit(points: Sequence[LossPoint]) -> Law:
    """Return the law with the least Huber loss of the residuals of log L, from the best of several starts.

    Raises:
        ValueError: fewer points than unknowns, a loss that is not positive, or nothing that varies.
    """
    names = varying(points)
    needed = 2 * len(names) + 1
    if not names:
        raise ValueError("parameters, pictures and flops are the same in every run: nothing to fit")
    if len(points) < needed:
        raise ValueError(
            f"{len(points)} measured losses are too few to fit {needed} numbers: train more sizes"
        )
    if min(point.loss for point in points) <= 0:
        raise ValueError("a loss is not positive, which no power law gives")
    lowest = min(point.loss for point in points)
    spread = max(point.loss for point in points) - lowest
    starts = [
        [
            *np.full(len(names), np.log(((1 - share) * lowest + spread) / len(names))),
            *exponents,
            np.log(share * lowest),
        ]
        for share in SHARES
        for exponents in product(EXPONENTS, repeat=len(names))
    ]
    return _search(points, names, starts)


def refit(points: Sequence[LossPoint], law: Law) -> Law:
    """Fit the terms of `law` to other points, starting the search from `law`."""
    names = list(law.terms)
    terms = [law.terms[name] for name in names]
    start = [*(np.log(term.coefficient) for term in terms), *(term.exponent for term in terms)]
    origins = {name: law.terms[name].origin for name in names}
    return _search(points, names, [[*start, np.log(law.irreducible)]], origins)


def bootstrap(points: Sequence[LossPoint], law: Law, *, draws: int = 200, seed: int = 0) -> list[Law]:
    """Return the laws of `draws` samples of the runs, drawn with replacement.

    Their spread is the confidence of the fit. Whole runs are drawn, because the points of one run are not
    independent.
    """
    random = np.random.Generator(np.random.Philox(seed))
    runs = list(dict.fromkeys(point.run for point in points))
    laws: list[Law] = []
    while len(laws) < draws:
        chosen = [runs[k] for k in random.integers(len(runs), size=len(runs))]
        drawn = [point for run in chosen for point in points if point.run == run]
        if set(law.terms) <= set(varying(drawn)):
            laws.append(refit(drawn, law))
    return laws


def varying(points: Sequence[LossPoint]) -> list[str]:
    """Return the variables that differ among points."""
    return [name for name in VARIABLES if len({getattr(point, name) for point in points}) > 1]


def _search(
    points: Sequence[LossPoint],
    names: Sequence[str],
    starts: Sequence[Sequence[float]],
    origins: Mapping[str, float] | None = None,
) -> Law:
    """Return the law of the best minimum found.

    A start is [log of each coefficient, exponents, log of the irreducible loss].
    """
    logs = np.log([[getattr(point, name) for name in names] for point in points])  # (P, V)
    middle = logs.mean(0) if origins is None else np.log([origins[name] for name in names])
    x, y = logs - middle, np.log([point.loss for point in points])

    free = (np.log(1e-12), np.log(1e12))
    bounds = [free] * len(names) + [(0.0, LARGEST_EXPONENT)] * len(names) + [free]
    options = {"maxiter": 2000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-9}
    best = min(
        (
            minimize(_huber_loss, start, (x, y), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            for start in starts
        ),
        key=lambda result: float(result.fun),
    )
    log_a, exponent, log_e = np.split(np.asarray(best.x, np.float64), [len(names), 2 * len(names)])
    terms = {
        name: LawTerm(float(np.exp(log_a[k])), float(exponent[k]), float(np.exp(middle[k])))
        for k, name in enumerate(names)
    }
    return Law(terms, float(np.exp(log_e[0])))


def _huber_loss(unknown: Floats, x: Floats, y: Floats) -> tuple[float, Floats]:
    """Return the Huber loss of the residuals of log L, and its gradient by `unknown`.

    `unknown` is laid out like a start of `_search`; x (P, V) are logarithms of variables over their origins,
    and y (P,) those of the measured losses.
    """
    variables = x.shape[1]
    log_a, exponent, log_e = np.split(unknown, [variables, 2 * variables])
    # Logarithms of the terms and of the irreducible loss, (P, V + 1); their log-sum-exp is the law's log L.
    log_terms = np.concatenate([log_a - exponent * x, np.broadcast_to(log_e, (len(x), 1))], 1)
    top = log_terms.max(1, keepdims=True)
    parts = np.exp(log_terms - top)
    total = parts.sum(1, keepdims=True)
    residual = (top + np.log(total))[:, 0] - y
    size = np.abs(residual)
    value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum()
    slope = np.clip(residual, -DELTA, DELTA)[:, None] * parts / total  # (P, V + 1)
    gradient = np.concatenate([slope[:, :-1].sum(0), -(slope[:, :-1] * x).sum(0), slope[:, -1:].sum(0)])
    return float(value) / DELTA**2, gradient / DELTA**2
