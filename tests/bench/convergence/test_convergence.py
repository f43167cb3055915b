"""The measured errors of solvers: their theoretical orders, Heun's method, and the files of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ditserve.bench import report
from ditserve.bench.convergence import __main__ as command
from ditserve.bench.convergence.gaussian import STDS, measured_order, run_error
from ditserve.bench.convergence.trials import TRIALS, Trial, heun_table
from ditserve.model.spec.diffusion import RectifiedFlow, Schedule, make_schedule, training_target
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.solvers import SOLVERS, trajectory
from tests.service.tiny_bundle import write_bundle

reference: Any = diffusers  # untyped
FLOW = Schedule(RectifiedFlow(), "flow", "sigma")
by_name = pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)


@by_name
@pytest.mark.parametrize("process", command.PROCESSES)
def test_every_solver_has_its_theoretical_order(trial: Trial, process: str) -> None:
    schedule, ends = command.PROCESSES[process]
    assert measured_order(trial, schedule, ends, 160) == pytest.approx(trial.order, abs=0.15)


def test_every_solver_that_is_served_is_measured() -> None:
    assert {trial.solver for trial in TRIALS} == {*SOLVERS, "heun"}


def test_unipc_2_earns_its_place_and_heun_does_not() -> None:
    """On whole runs of up to 20 calls, with as many calls for each."""
    trials = {trial.name: trial for trial in TRIALS}
    for schedule in (FLOW, make_schedule("linear"), make_schedule("cosine", prediction="v")):
        for calls in (5, 7, 9, 11, 15, 19):
            errors = {
                name: run_error(
                    trial, noise_levels(even_grid(schedule), trial.grid_steps(calls), schedule), schedule
                )
                for name, trial in trials.items()
            }
            assert min(errors, key=lambda name: errors[name]) == "unipc-2"
            assert errors["heun"] > max(errors[name] for name in ("dpmpp-2m", "unipc-1", "unipc-2"))


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "unipc-1", "unipc-2", "heun"])
@pytest.mark.parametrize("schedule", [FLOW, make_schedule("cosine", prediction="v")])
def test_the_error_is_that_of_samples(name: str, schedule: Schedule) -> None:
    trial = next(trial for trial in TRIALS if trial.name == name)
    levels = noise_levels(even_grid(schedule), 6, schedule)

    def network(x: Any, level: float) -> Any:
        alpha, sigma = schedule.alpha(level), schedule.sigma(level)
        image = x * alpha * STDS**2 / (alpha**2 * STDS**2 + sigma**2)
        noise = (x - alpha * image) / sigma
        return training_target(schedule.prediction, alpha, sigma, image, noise)

    # A deterministic run of a linear network scales its noise, and thus the deviation of all that is drawn.
    noise = np.full(STDS.shape, float(schedule.sigma(levels[0])))
    *_, (images, _) = trajectory(trial.table(levels, schedule), noise, network)
    expected = np.sqrt(np.mean((np.abs(images) / STDS - 1.0) ** 2))
    assert run_error(trial, levels, schedule) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy 2
def test_heun_is_that_of_diffusers(steps: int, shift: float) -> None:
    scheduler = reference.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas[:-1].double().numpy()
    levels = [sigmas[0], *sigmas[1::2]]

    def velocity(x: Any, sigma: float) -> Any:
        return 0.8 * x + 0.3 * (x * x + 1.0) ** 0.5 * (1.0 - sigma) - 0.2

    start = np.random.default_rng(0).standard_normal((2, 4))
    sample = torch.from_numpy(start)
    table = heun_table(levels, FLOW)
    ours = trajectory(table, start, velocity)
    for t, sigma, (x, _) in zip(scheduler.timesteps, table.level.tolist(), ours, strict=True):
        sample = scheduler.step(velocity(sample, sigma), t, sample).prev_sample
        np.testing.assert_allclose(x, sample.numpy(), rtol=1e-6, atol=1e-6)


def test_the_command_writes_the_table_the_figure_and_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "CALLS", command.TOLD)
    monkeypatch.setattr(command, "PICTURE_CALLS", (3, 5))
    write_bundle(tmp_path, weights=True)
    assert command.main(["--bundle", str(tmp_path), "--samples", "1"]) == 0
    text = (tmp_path / "results" / "convergence.md").read_text()
    assert "Whole runs: variance-preserving" in capsys.readouterr().out
    assert "## Pictures of a model" in text
    kept = json.loads((tmp_path / "results" / "convergence.json").read_text())
    assert "| ddim |  |  |" in text
    assert [len(kept["pictures"][trial.name]) for trial in command.PICTURED] == [2] * 5
    assert kept["runs"]["flow"]["unipc-2"]["5"] == pytest.approx(0.296, abs=0.001)
    assert (tmp_path / "results" / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_data_without_a_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--data", "pictures.npz"]) == 2
    assert "name it with --bundle" in capsys.readouterr().err
