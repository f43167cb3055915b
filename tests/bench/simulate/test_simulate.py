"""The simulated service: its parts add up, and its strategies keep the order by which they are chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ditserve.bench import report
from ditserve.bench.load.workload import CLIP_COST, PROCESSES, Arrival, Traffic
from ditserve.bench.simulate import __main__ as command
from ditserve.bench.simulate.fleet import SimulatedFleet
from ditserve.bench.simulate.outcome import offered_rate, simulate
from ditserve.bench.simulate.scenario import (
    CLAIM_ORDERS,
    CURVES,
    LADDERS,
    STRATEGIES,
    SimulatedCluster,
    Strategy,
)

GPU = SimulatedCluster(CURVES["gpu"], LADDERS["ddim"])
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


def attained(name: str, load: float, n: int = 200, cluster: SimulatedCluster = GPU) -> float:
    return simulate(BY_NAME[name], cluster, Traffic(), load, n=n, seed=3).attainment


@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "at-once"])
def test_arrivals_come_at_the_rate_asked_for(process: str) -> None:
    times = PROCESSES[process](20_000, 2.0, np.random.default_rng(0))
    assert times[-1] == pytest.approx(10_000, rel=0.05)
    assert (np.diff(times) >= 0).all()


def test_traffic_is_the_same_for_everyone() -> None:
    traffic = Traffic("bursts", refusing=0.3)
    assert traffic.draw(100, 1.0, 7) == traffic.draw(100, 1.0, 7)
    assert 0.1 < np.mean([not arrival.consents for arrival in traffic.draw(300, 1.0, 7)]) < 0.5


def test_the_published_curve_passes_through_its_points() -> None:
    curve = CURVES["gpu"]
    assert [curve.seconds(rows) for rows, _ in curve.points] == pytest.approx([s for _, s in curve.points])
    assert curve.seconds(6) == pytest.approx((0.240 + 0.425) / 2)
    assert curve.peak == pytest.approx(16 / 0.832)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_a_lone_request_gets_all_its_steps_in_time(strategy: Strategy) -> None:
    (sample,) = SimulatedFleet(strategy, GPU).run([Arrival(1.0, 20)])
    assert sample.in_time
    assert sample.taken == 20
    assert sample.quality == pytest.approx(3.48)
    assert (sample.finished or 0.0) - 1.0 == pytest.approx(20 * GPU.curve.seconds(1), rel=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
@pytest.mark.parametrize(("workers", "ladder"), [(1, "ddim"), (3, "ddim"), (2, "backbones")])
def test_every_request_ends_one_way(strategy: Strategy, workers: int, ladder: str) -> None:
    cluster = SimulatedCluster(CURVES["gpu"], LADDERS[ladder], workers)
    samples = SimulatedFleet(strategy, cluster, seed=1).run(
        Traffic("bursts", refusing=0.5).draw(80, 0.9 * workers, 1)
    )
    for sample in samples:
        assert not (sample.rejected and sample.finished)
        if sample.finished is not None:
            assert sample.remaining == 0
            assert sample.noise == pytest.approx(0.0, abs=1e-9)
            assert sample.consents or sample.taken == sample.requested.steps
        elif not strategy.expire:
            assert sample.rejected


def test_sixty_four_workers_at_eight_times_the_load_move_requests_over_all_backbones() -> None:
    cluster = SimulatedCluster(CURVES["gpu"], LADDERS["backbones"], 64)
    fleet = SimulatedFleet(BY_NAME["planned every step"], cluster, seed=1)
    traffic = Traffic()
    samples = fleet.run(traffic.draw(600, offered_rate(cluster, traffic, 8.0), 1))
    served = [sample for sample in samples if sample.finished is not None]
    assert sum(sample.in_time for sample in served) >= 0.97 * len(samples)
    assert len(served) + sum(sample.rejected for sample in samples) == len(samples)
    assert {part.backbone for sample in served for part in sample.rung.stretches} >= {"light", "student"}


def test_above_capacity_planning_every_step_beats_planning_at_admission_beats_none() -> None:
    every_step = attained("planned every step", 1.4)
    at_admission = attained("planned at admission", 1.4)
    none = attained("EDF + admission", 1.4)
    assert every_step >= 0.95
    assert every_step > at_admission > none
    assert none > attained("FIFO steps", 1.4) + 0.2


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("load", [1.1, 2.0])
def test_what_is_accepted_at_all_its_steps_is_kept(curve: str, load: float) -> None:
    cluster = SimulatedCluster(CURVES[curve], LADDERS["ddim"])
    outcome = simulate(BY_NAME["EDF + admission"], cluster, Traffic(), load, n=300, seed=3)
    assert outcome.dropped <= 0.03


def test_below_half_load_nothing_is_degraded() -> None:
    outcome = simulate(BY_NAME["planned every step"], GPU, Traffic(), 0.4, n=200, seed=3)
    assert outcome.attainment == 1.0
    assert outcome.full_steps == 1.0


def test_several_workers_share_the_queue() -> None:
    assert (
        attained("planned every step", 1.1, 300, SimulatedCluster(CURVES["gpu"], LADDERS["ddim"], 4)) >= 0.95
    )


def test_the_command_prints_saves_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    words = [
        "--curves",
        "gpu",
        "--processes",
        "flash",
        "--loads",
        "0.5",
        "1.4",
        "--requests",
        "30",
        "--seeds",
        "1",
    ]
    assert command.main(words) == 0
    assert "planned every step" in capsys.readouterr().out
    saved = json.loads((tmp_path / "simulate.json").read_text())
    assert len(saved["points"]) == 2 * len(STRATEGIES)
    assert (tmp_path / "simulate.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_of_claims_prints_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert command.main(["--claims", "--requests", "20", "--seeds", "1", "--curves", "cpu"]) == 0
    assert "attained" in capsys.readouterr().out
    assert json.loads((tmp_path / "claims.json").read_text())["points"]


def test_claims_by_deadline_keep_a_deep_queue_safe() -> None:
    cluster = SimulatedCluster(CURVES["gpu"], LADDERS["ddim"], 1, slo=30.0)
    by_arrival, by_deadline = (
        simulate(Strategy("", lookahead=0, claims=order), cluster, Traffic(), 1.4, n=500, seed=5)
        for order in CLAIM_ORDERS
    )
    assert by_deadline.dropped < 0.01 < by_arrival.dropped


def attained_by_cost(load: float) -> dict[float, float]:
    """Return the share answered in time of stills, of row cost 1, and of clips, in a mix with 3 workers."""
    traffic, cluster = Traffic(clips=0.3), replace(GPU, workers=3)
    samples = SimulatedFleet(BY_NAME["planned every step"], cluster, seed=3).run(
        traffic.draw(150, offered_rate(cluster, traffic, load), 3)
    )
    return {
        cost: float(np.mean([sample.in_time for sample in samples if sample.row_cost == cost]))
        for cost in (1.0, CLIP_COST)
    }


def test_below_half_load_clips_and_stills_of_one_queue_are_in_time() -> None:
    attained = attained_by_cost(0.4)
    assert attained[CLIP_COST] == 1.0
    # Passes of clips, which are longer, take turns with those of stills.
    assert attained[1.0] >= 0.95
