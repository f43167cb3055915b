"""The law that a family of trained models follows, fitted to measured losses. Pure but for scipy's optimiser.

    L(N, D, T) = A·N^−α + B·D^−β + C·T^−γ + ε

N parameters, D different training pictures, T floating-point operations of training. Source: Hoffmann et al., arXiv:2203.15556,
§3.3 and appendix D.2 ("approach 3"), there for N and D; the term of T is what training longer on the same pictures is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize  # type: ignore[import-untyped]

Floats = npt.NDArray[np.float64]

DELTA = 1e-3  # residuals of the logarithm beyond this count linearly, as in the source
VARIABLES = ("parameters", "pictures", "flops")
EXPONENTS = (0.2, 0.8)  # where the search starts, of each variable
SHARES = (0.2, 0.8)  # of the smallest loss that is irreducible, where the search starts
LARGEST_EXPONENT = 5.0


@dataclass(frozen=True, slots=True)
class Point:
    """A measured loss of one run; several points of a run are not independent of each other."""

    run: str
    parameters: float
    pictures: float
    flops: float
    loss: float


@dataclass(frozen=True, slots=True)
class Term:
    """coefficient · (variable / origin)^−exponent; the origin, amid the data, keeps the coefficient of the size of a loss."""

    coefficient: float
    exponent: float
    origin: float

    @property
    def plain(self) -> float:
        """The coefficient of variable^−exponent."""
        return float(self.coefficient * self.origin**self.exponent)


@dataclass(frozen=True, slots=True)
class Law:
    """The terms by variable; one that did not vary has none, its share being part of `irreducible`."""

    terms: Mapping[str, Term]
    irreducible: float

    def loss(self, **variables: npt.ArrayLike) -> Floats:
        """The loss at some `parameters`, `pictures` and `flops`, which broadcast."""
        found = np.asarray(self.irreducible, np.float64)
        for name, term in self.terms.items():
            ratio = np.asarray(variables[name], np.float64) / term.origin
            found = found + term.coefficient * ratio**-term.exponent
        return found


def fit(points: Sequence[Point]) -> Law:
    """The law of least Huber loss of the residuals of log L, from the best of several starts.

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


def refit(points: Sequence[Point], law: Law) -> Law:
    """The law of other points with the same terms, searched from `law`."""
    names = list(law.terms)
    terms = [law.terms[name] for name in names]
    start = [*(np.log(term.coefficient) for term in terms), *(term.exponent for term in terms)]
    origins = {name: law.terms[name].origin for name in names}
    return _search(points, names, [[*start, np.log(law.irreducible)]], origins)


def bootstrap(points: Sequence[Point], law: Law, *, draws: int = 200, seed: int = 0) -> list[Law]:
    """Laws of as many runs drawn with replacement: how far the fit would move with other runs. Whole runs are drawn."""
    random = np.random.Generator(np.random.Philox(seed))
    runs = list(dict.fromkeys(point.run for point in points))
    laws: list[Law] = []
    while len(laws) < draws:
        chosen = [runs[k] for k in random.integers(len(runs), size=len(runs))]
        drawn = [point for run in chosen for point in points if point.run == run]
        if set(law.terms) <= set(varying(drawn)):
            laws.append(refit(drawn, law))
    return laws


def varying(points: Sequence[Point]) -> list[str]:
    """The variables that differ among points."""
    return [name for name in VARIABLES if len({getattr(point, name) for point in points}) > 1]


def _search(
    points: Sequence[Point],
    names: Sequence[str],
    starts: Sequence[Sequence[float]],
    origins: Mapping[str, float] | None = None,
) -> Law:
    """The best minimum from the starts: logarithms of coefficients, exponents, logarithm of the irreducible loss."""
    logs = np.log([[getattr(point, name) for name in names] for point in points])  # (P, V)
    middle = logs.mean(0) if origins is None else np.log([origins[name] for name in names])
    x, y = logs - middle, np.log([point.loss for point in points])

    def objective(unknown: Floats) -> tuple[float, Floats]:
        log_a, exponent, log_e = np.split(unknown, [len(names), 2 * len(names)])
        each = np.concatenate([log_a - exponent * x, np.broadcast_to(log_e, (len(x), 1))], 1)  # (P, V + 1)
        top = each.max(1, keepdims=True)
        parts = np.exp(each - top)
        total = parts.sum(1, keepdims=True)
        residual = (top + np.log(total))[:, 0] - y
        size = np.abs(residual)
        value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum()
        slope = np.clip(residual, -DELTA, DELTA)[:, None] * parts / total  # (P, V + 1)
        gradient = np.concatenate([slope[:, :-1].sum(0), -(slope[:, :-1] * x).sum(0), slope[:, -1:].sum(0)])
        return float(value) / DELTA**2, gradient / DELTA**2

    free = (np.log(1e-12), np.log(1e12))
    bounds = [free] * len(names) + [(0.0, LARGEST_EXPONENT)] * len(names) + [free]
    options = {"maxiter": 2000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-9}
    found = min(
        (
            minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            for start in starts
        ),
        key=lambda result: float(result.fun),
    )
    log_a, exponent, log_e = np.split(np.asarray(found.x, np.float64), [len(names), 2 * len(names)])
    terms = {
        name: Term(float(np.exp(log_a[k])), float(exponent[k]), float(np.exp(middle[k])))
        for k, name in enumerate(names)
    }
    return Law(terms, float(np.exp(log_e[0])))
