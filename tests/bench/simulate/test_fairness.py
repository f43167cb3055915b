"""The study of fairness: short requests are not held up by what others do, and priorities count."""

from __future__ import annotations

import pytest

from ditserve.bench.simulate.fairness import SCENARIOS, fairness_table, shares_by_priority, study_fairness
from ditserve.bench.simulate.scenario import CURVES
from ditserve.service.jobs import WEIGHTS


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_beside_any_work_a_short_request_takes_its_fair_time_and_leaves_the_others_theirs(
    scenario: str, curve: str
) -> None:
    outcome = study_fairness(scenario, curve)
    assert outcome.of_fair <= 1.1
    assert outcome.others_keep >= 0.95 * outcome.others_fair
    passes = 6 if "high" in scenario else 2
    assert outcome.first_step_s <= passes * CURVES[curve].seconds(CURVES[curve].max_rows)
    assert f"| {scenario} | {curve} |" in fairness_table([outcome], {"normal": 1.0})


def test_callers_share_a_machine_by_the_weights_of_their_priorities() -> None:
    shares = shares_by_priority("tiny")
    for priority, weight in WEIGHTS.items():
        assert shares[priority] == pytest.approx(weight / sum(WEIGHTS.values()), rel=0.05)
