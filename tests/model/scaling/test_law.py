"""The scaling law: known coefficients are recovered, also with outliers; impossible fits are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditserve.model.scaling.law import Law, LawTerm, LossPoint, bootstrap, fit, refit

SIZES, DATA, COMPUTE = (3e5, 1e6, 3e6, 1e7), (250.0, 500.0, 1000.0, 2000.0), (1e11, 1e12, 1e13, 1e14)
KNOWN = Law(
    {
        "parameters": LawTerm(0.4, 0.35, 1e6),
        "pictures": LawTerm(0.3, 0.6, 1e3),
        "flops": LawTerm(0.5, 0.28, 1e12),
    },
    0.2,
)


def measured(law: Law, *, noise: float = 0.0, sizes: tuple[float, ...] = SIZES) -> list[LossPoint]:
    random = np.random.default_rng(0)
    points = []
    for size, data, flops in product(sizes, DATA, COMPUTE):
        values = {"parameters": size, "pictures": data, "flops": flops}
        loss = float(law.loss(**{name: values[name] for name in law.terms})) * math.exp(
            random.normal(0, noise)
        )
        points.append(LossPoint(f"{size:g}/{data:g}", size, data, flops, loss))
    return points


def test_the_law_is_the_sum_of_its_terms() -> None:
    assert KNOWN.loss(parameters=1e6, pictures=1e3, flops=1e12) == pytest.approx(1.4)
    assert KNOWN.loss(parameters=[1e6, 1e7], pictures=1e3, flops=1e12).shape == (2,)
    plain = {name: term.plain for name, term in KNOWN.terms.items()}
    by_hand = (
        plain["parameters"] * 5e6**-0.35 + plain["pictures"] * 700**-0.6 + plain["flops"] * 1e13**-0.28 + 0.2
    )
    assert KNOWN.loss(parameters=5e6, pictures=700, flops=1e13) == pytest.approx(by_hand)


def test_the_gain_of_twice_as_much_is_the_difference_of_two_losses() -> None:
    gains = KNOWN.gains(LossPoint("run", 1e6, 1e3, 1e12, 1.3))
    halved = {"parameters": (0.4, 0.35), "pictures": (0.3, 0.6), "flops": (0.5, 0.28)}
    assert gains == pytest.approx({name: a * (1 - 2**-e) for name, (a, e) in halved.items()})


def test_all_seven_numbers_are_found_again() -> None:
    fitted = fit(measured(KNOWN))
    assert fitted.irreducible == pytest.approx(0.2, rel=1e-3)
    for name, term in KNOWN.terms.items():
        assert fitted.terms[name].exponent == pytest.approx(term.exponent, rel=1e-3)
        assert fitted.terms[name].plain == pytest.approx(term.plain, rel=1e-2)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(st.floats(0.1, 1.0), st.floats(0.2, 1.2), st.floats(0.1, 1.0), st.floats(0.2, 1.2)),
    st.floats(0.05, 0.5),
)
def test_any_law_of_two_variables_is_found_again(
    numbers: tuple[float, float, float, float], rest: float
) -> None:
    a, alpha, c, gamma = numbers
    law = Law({"parameters": LawTerm(a, alpha, 2e6), "flops": LawTerm(c, gamma, 3e12)}, rest)
    points = [replace(point, pictures=1000.0) for point in measured(law)][::3]
    fitted = fit(points)
    assert set(fitted.terms) == {"parameters", "flops"}
    assert fitted.terms["parameters"].exponent == pytest.approx(alpha, rel=0.02, abs=0.01)
    assert fitted.terms["flops"].exponent == pytest.approx(gamma, rel=0.02, abs=0.01)
    assert fitted.irreducible == pytest.approx(rest, rel=0.05, abs=0.01)


def test_a_run_that_went_wrong_moves_the_law_little() -> None:
    points = measured(KNOWN, noise=0.002)
    points[17] = replace(points[17], loss=points[17].loss * 5)
    fitted = fit(points)
    for name, term in KNOWN.terms.items():
        assert fitted.terms[name].exponent == pytest.approx(term.exponent, rel=0.1)


def test_other_runs_would_have_given_laws_around_the_fitted_one() -> None:
    points = measured(KNOWN, noise=0.01)
    law = fit(points)
    laws = bootstrap(points, law, draws=12, seed=1)
    exponents = [other.terms["flops"].exponent for other in laws]
    assert min(exponents) < law.terms["flops"].exponent < max(exponents)
    assert min(exponents) < KNOWN.terms["flops"].exponent < max(exponents)
    again = bootstrap(points, law, draws=12, seed=1)
    assert [other.irreducible for other in again] == [other.irreducible for other in laws]
    exact = measured(KNOWN)
    steady = bootstrap(exact, fit(exact), draws=3)
    assert np.ptp([other.terms["flops"].exponent for other in steady]) < 1e-3


def test_searching_again_from_the_law_keeps_it() -> None:
    points = measured(KNOWN)
    law = fit(points)
    assert refit(points, law).irreducible == pytest.approx(law.irreducible, rel=1e-4)


def test_what_cannot_be_fitted_is_refused() -> None:
    points = measured(KNOWN)
    with pytest.raises(ValueError, match="nothing to fit"):
        fit(points[:1] * 9)
    with pytest.raises(ValueError, match="6 measured losses are too few to fit 7 numbers"):
        fit([points[0], points[1], points[4], points[16], points[21], points[63]])
    with pytest.raises(ValueError, match="not positive"):
        fit([*points, replace(points[0], loss=0.0)])
