"""The study of autoscaling: its autoscaler is that of the manifests, and workers follow the load."""

from __future__ import annotations

from ditserve.bench.simulate import autoscaler
from ditserve.bench.simulate.autoscaler import Autoscaler
from ditserve.bench.simulate.autoscaling import markdown, study_autoscaling
from tests.deploy.files import manifest


def test_the_autoscaler_is_configured_as_the_manifests_say() -> None:
    scaled = manifest("ScaledObject", "worker")["spec"]
    for trigger in scaled["triggers"]:
        assert float(trigger["metadata"]["threshold"]) == autoscaler.THRESHOLD
    assert f"[{autoscaler.WINDOW_S / 60:.0f}m]" in scaled["triggers"][0]["metadata"]["query"]
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"] == {
        "stabilizationWindowSeconds": 0,
        "policies": [
            {"type": "Percent", "value": 100 * autoscaler.UP_SHARE, "periodSeconds": autoscaler.UP_PERIOD_S},
            {"type": "Pods", "value": autoscaler.UP_PODS, "periodSeconds": autoscaler.UP_PERIOD_S},
        ],
    }
    assert behavior["scaleDown"] == {
        "stabilizationWindowSeconds": autoscaler.DOWN_AFTER_S,
        "policies": [
            {"type": "Pods", "value": autoscaler.DOWN_PODS, "periodSeconds": autoscaler.DOWN_PERIOD_S}
        ],
    }


def test_the_autoscaler_adds_fast_and_takes_away_slowly() -> None:
    """The worked example."""
    scaler = Autoscaler(most=8, first=2)
    assert [scaler.decide(3.5, now) for now in (0.0, 15.0, 30.0, 45.0)] == [4, 4, 5, 5]
    fewer = [scaler.decide(0.5, 60.0 + 15.0 * k) for k in range(40)]
    assert fewer[:18] == [5] * 18, "not within five minutes"
    assert list(dict.fromkeys(fewer)) == [5, 4, 3, 2, 1]


def test_a_little_more_or_less_changes_nothing() -> None:
    scaler = Autoscaler(most=8, first=4)
    assert [scaler.decide(needed, 15.0 * k) for k, needed in enumerate((2.6, 3.0, 2.6, 3.0))] == [4] * 4


def test_workers_follow_the_load_up_and_down_without_flapping() -> None:
    """A day of twenty minutes, with workers that take a minute to start."""
    outcome = study_autoscaling("asked for and backlog", seconds=1200.0, low=0.2, high=2.0)
    assert outcome.most >= 3
    assert outcome.numbers[-1][1] < outcome.most
    assert outcome.turns <= 1
    assert outcome.attainment >= 0.97
    assert outcome.full_steps >= 0.9
    assert "| asked for and backlog |" in markdown([outcome])


def test_what_workers_hold_says_less() -> None:
    """The figure before this one: it is small where admission keeps the queue short."""
    held, asked = (
        study_autoscaling(signal, seconds=600.0, low=0.3, high=2.4)
        for signal in ("samples held (before)", "asked for and backlog")
    )
    assert held.full_steps < asked.full_steps
    assert held.most <= asked.most
