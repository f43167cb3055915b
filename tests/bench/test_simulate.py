"""The simulated service: its parts add up, and its arms keep the order that the policies are chosen by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ditserve.bench import plots, simulate
from ditserve.bench.arrivals import PROCESSES, Arrival, Traffic
from ditserve.bench.curves import CURVES, LADDERS
from ditserve.bench.fleet import ORDERS, Arm, Fleet, Site
from ditserve.bench.necessity import need

GPU = Site(CURVES["gpu"], LADDERS["ddim"])
ARMS = {arm.name: arm for arm in simulate.ARMS}


def attained(arm: str, load: float, n: int = 200, site: Site = GPU, seed: int = 3) -> float:
    return simulate.simulate(ARMS[arm], site, Traffic(), load, n, seed).attainment


@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "at-once"])
def test_arrivals_come_at_the_rate_asked_for(process: str) -> None:
    times = PROCESSES[process](20_000, 2.0, np.random.default_rng(0))
    assert times[-1] == pytest.approx(10_000, rel=0.05)
    assert (np.diff(times) >= 0).all()


def test_traffic_is_the_same_for_everyone() -> None:
    traffic = Traffic("bursts", refusing=0.3)
    assert traffic.draw(100, 1.0, 7) == traffic.draw(100, 1.0, 7)
    assert 0.1 < np.mean([not each.consents for each in traffic.draw(300, 1.0, 7)]) < 0.5


def test_the_published_curve_passes_through_its_points() -> None:
    curve = CURVES["gpu"]
    assert [curve.seconds(rows) for rows, _ in curve.points] == pytest.approx([s for _, s in curve.points])
    assert curve.seconds(6) == pytest.approx((0.240 + 0.425) / 2)
    assert curve.peak == pytest.approx(16 / 0.832)


@pytest.mark.parametrize("arm", simulate.ARMS, ids=lambda arm: arm.name)
def test_a_lone_request_gets_all_its_steps_in_time(arm: Arm) -> None:
    (sample,) = Fleet(arm, GPU).run([Arrival(1.0, 20)])
    assert sample.kept
    assert sample.steps == 20
    assert sample.quality == pytest.approx(3.48)
    assert (sample.finished or 0.0) - 1.0 == pytest.approx(20 * GPU.curve.seconds(1), rel=0.05)


@pytest.mark.parametrize("arm", simulate.ARMS, ids=lambda arm: arm.name)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_request_ends_one_way(arm: Arm, workers: int) -> None:
    site = Site(CURVES["gpu"], LADDERS["ddim"], workers)
    samples = Fleet(arm, site, seed=1).run(Traffic("bursts", refusing=0.5).draw(80, 0.9 * workers, 1))
    for sample in samples:
        assert not (sample.rejected and sample.finished)
        if sample.finished is not None:
            assert sample.remaining == 0
            assert sample.noise == pytest.approx(0.0, abs=1e-9)
            assert sample.consents or sample.steps == sample.asked.steps
        elif not arm.expire:
            assert sample.rejected


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
    site = Site(CURVES[curve], LADDERS["ddim"])
    outcome = simulate.simulate(ARMS["EDF + admission"], site, Traffic(), load, 300, 3)
    assert outcome.dropped <= 0.03


def test_below_half_load_nothing_is_degraded() -> None:
    outcome = simulate.simulate(ARMS["planned every step"], GPU, Traffic(), 0.4, 200, 3)
    assert outcome.attainment == 1.0
    assert outcome.full_steps == 1.0


def test_where_rows_gain_nothing_by_batching_only_bursts_that_no_schedule_survives_are_cut() -> None:
    tight = Site(CURVES["cpu"], LADDERS["ddim"])
    late, cut, vain, kept = np.mean([need(tight, 0.5, 200, seed) for seed in (11, 13)], axis=0)
    assert kept >= 0.99
    assert 0.0 < late < cut < late + 0.03
    assert vain < 0.02
    roomy = Site(CURVES["cpu"], LADDERS["ddim"], 1, 10.0)
    assert need(roomy, 0.5, 100, 11) == (0.0, 0.0, 0.0, 1.0)


def test_several_workers_share_the_queue() -> None:
    assert attained("planned every step", 1.1, 300, Site(CURVES["gpu"], LADDERS["ddim"], 4)) >= 0.95


def test_the_command_prints_saves_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulate, "RESULTS", tmp_path)
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
    simulate.main(words)
    assert "planned every step" in capsys.readouterr().out
    saved = json.loads((tmp_path / "simulate.json").read_text())
    assert len(saved["points"]) == 2 * len(simulate.ARMS)
    assert (tmp_path / "simulate.png").read_bytes().startswith(b"\x89PNG")
    assert plots.RESULTS.name == "results"


@pytest.mark.parametrize("study", ["claims", "necessity"])
def test_the_other_studies_print_and_save(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulate, "RESULTS", tmp_path)
    simulate.main([f"--{study}", "--requests", "20", "--seeds", "1", "--curves", "cpu"])
    assert ("attained" if study != "necessity" else "in vain") in capsys.readouterr().out
    assert json.loads((tmp_path / f"{study}.json").read_text())["points"]


def test_claims_by_deadline_keep_a_deep_queue_safe() -> None:
    site = Site(CURVES["gpu"], LADDERS["ddim"], 1, slo=30.0)
    by_arrival, by_deadline = (
        simulate.simulate(Arm("", holds=12, claims=order), site, Traffic(), 1.4, 500, 5) for order in ORDERS
    )
    assert by_deadline.dropped < 0.01 < by_arrival.dropped
