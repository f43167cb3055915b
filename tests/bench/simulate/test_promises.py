"""The study of promises: deadlines that are accepted are kept, and the refused are taken when they return."""

from __future__ import annotations

import numpy as np
import pytest

from ditserve.bench.simulate.host import NOISY, STEADY, SimulatedHost, mean_pace
from ditserve.bench.simulate.promises import markdown, study_promises


def test_a_steady_host_takes_as_long_as_the_work() -> None:
    host = SimulatedHost(STEADY, np.random.default_rng(0))
    assert host.end_of(3.0, 2.5) == 5.5
    assert host.work(7.0) == 7.0


def test_a_noisy_host_does_what_its_pace_allows() -> None:
    host = SimulatedHost(NOISY, np.random.default_rng(0))
    at = 0.0
    for _ in range(2000):
        at = host.end_of(at, 0.1)
    assert host.work(at) == pytest.approx(200.0)
    assert 200.0 / at == pytest.approx(mean_pace(NOISY), rel=0.3)


def test_below_half_load_nothing_is_refused_or_broken() -> None:
    outcome = study_promises(1, "quiet", 0.5, seconds=10.0, seeds=(1,))
    assert (outcome.refused, outcome.broken) == (0.0, 0.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_overload_on_a_quiet_host_breaks_nothing_and_uses_the_machine(workers: int) -> None:
    outcome = study_promises(workers, "quiet", 1.5, seconds=8.0, seeds=(1,))
    assert outcome.broken <= 0.02
    assert outcome.used >= 0.85
    assert outcome.refused > 0.1


def test_most_of_those_who_obey_retry_after_are_taken_when_they_first_return() -> None:
    outcome = study_promises(1, "quiet", 3.0, returning=True, seconds=10.0, seeds=(1,))
    assert outcome.taken_on_return is not None
    assert outcome.taken_on_return >= 0.8
    assert outcome.broken <= 0.02


def test_on_a_noisy_host_few_promises_are_broken_and_the_machine_is_used() -> None:
    outcome = study_promises(1, "noisy", 3.0, seconds=20.0)
    assert outcome.broken <= 0.05
    assert outcome.used >= 0.6
    assert "| 1 | 1 | noisy | 3 |" in markdown([outcome])
