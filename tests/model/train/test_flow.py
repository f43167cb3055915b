"""Training a flow: the right distribution on toy data, and a whole run with all that belongs to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditserve.model.sample import main as sample
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance
from ditserve.model.spec.diffusion import RectifiedFlow, Schedule
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.model.train import training
from ditserve.model.train.__main__ import main
from ditserve.model.train.load import load_model
from ditserve.model.train.loss import draw_levels, squared_error, training_noise
from ditserve.model.train.trainer import Trainer
from tests.model.train.distillation.distillation_cases import write_teacher
from tests.model.train.training_cases import assert_same, config_file, newest_state, tiny_config, tiny_run

FLOW = {"schedule": "flow", "prediction": "flow"}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
# As SiT is trained: told 1 - sigma, and the output points from noise to image.
SIT = {**FLOW, "noise_input": "1-sigma", "noise_scale": 1.0, "output_sign": -1}
IMAGE = {"schedule": "flow", "prediction": "x0"}
MODES = 5
STD = 0.08


def toy_data(count: int, generator: torch.Generator) -> Tensor:
    """Draw points (N, 2, 1, 1) of five narrow modes on a circle; mode k has the share (k + 1) / 15."""
    mode = torch.multinomial(torch.arange(1.0, MODES + 1), count, replacement=True, generator=generator)
    angle = 2 * np.pi * mode / MODES
    centre = torch.stack([angle.cos(), angle.sin()], dim=1)
    return (centre + STD * torch.randn(count, 2, generator=generator))[:, :, None, None]


class PointNetwork(nn.Module):
    """A network of points (N, 2, 1, 1) that is told its noise level."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        layers = [nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        angles = told[:, None] * torch.arange(1.0, 9.0)
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)
        velocity: Tensor = self.layers(features)
        return velocity[:, :, None, None]


def toy_network(schedule: Schedule, law: tuple[float, float] | None, shift: float) -> PointNetwork:
    """Return the network of a short training on the toy data, by the losses of the trainer."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network, noise = PointNetwork(), training_noise(schedule)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    steps = 900
    for step in range(steps):
        x0 = toy_data(512, generator)
        row = noise.at(draw_levels(len(x0), schedule, generator, law=law, shift=shift))
        z = torch.randn(x0.shape, generator=generator)
        loss = squared_error(row, network(row.noisy(x0, z), row.told), x0, z).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        optimizer.step()
    return network


@pytest.mark.parametrize(
    ("schedule", "law", "shift", "solver", "steps"),
    [
        (Schedule(RectifiedFlow(), "flow", "1-sigma", output_sign=-1), None, 1.0, "euler", 60),
        (Schedule(RectifiedFlow(), "flow", "sigma"), (0.0, 1.0), 1.2, "ddpm", 100),
        (Schedule(RectifiedFlow(), "x0", "sigma"), (0.0, 1.0), 1.0, "ddim", 100),
    ],
    ids=["velocity as SiT", "velocity, logit-normal and shifted", "image"],
)
def test_a_trained_flow_samples_the_distribution_of_the_data(
    schedule: Schedule, law: tuple[float, float] | None, shift: float, solver: str, steps: int
) -> None:
    network = toy_network(schedule, law, shift)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(6000, 2, 1, 1, generator=generator)

    def output(x: Tensor, level: float) -> Tensor:
        with torch.no_grad():
            velocity: Tensor = network(x, torch.full((len(x),), float(schedule.told(level))))
        return velocity

    table = step_table(solver, noise_levels("uniform", steps, schedule), schedule)
    noise = lambda: torch.randn(start.shape, generator=generator)  # noqa: E731
    *_, (points, _) = trajectory(table, start, output, noise=noise)
    z = torch.complex(points[:, 0, 0, 0], points[:, 1, 0, 0])
    mode = (z.angle() / (2 * np.pi) * MODES).round().long() % MODES
    shares = torch.bincount(mode, minlength=MODES) / len(z)
    torch.testing.assert_close(shares, torch.arange(1.0, MODES + 1) / 15, atol=0.03, rtol=0)
    assert z.abs().mean().item() == pytest.approx(1.0, abs=0.05)
    assert z.abs().std().item() == pytest.approx(STD, abs=0.05)


@pytest.mark.parametrize("diffusion", [FLOW, SIT, IMAGE], ids=["sigma", "as SiT", "image"])
def test_a_run_on_a_flow_goes_on_bit_for_bit_and_is_sampled(
    diffusion: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"diffusion": diffusion, "loss_cap": None, "timesteps": "logit-normal", "noise_shift": 3.0}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = tiny_config(tmp_path / "whole", **changes, sheet_every=12, steps=12)
    training.train(whole)
    assert list(whole.output.glob("sheet-*.png"))
    parts = tiny_config(tmp_path / "parts", **changes, steps=12)
    first = Trainer(parts)
    for _ in range(4):
        first.step()
    first.save()
    first.close()
    training.train(parts)
    assert_same(newest_state(whole.output), newest_state(parts.output))
    manifest = load_model(parts.output).manifest
    assert (manifest.defaults.grid, manifest.diffusion.schedule) == ("uniform", "flow")
    picture = tmp_path / "sheet.png"
    assert sample([str(parts.output), "-o", str(picture), "--steps", "3", "--solver", "dpmpp-2m"]) == 0
    assert picture.is_file()
    assert sample([str(parts.output), "-o", str(picture), "--grid", "1,0.4"]) == 2
    assert "explicit grid has 2 sigmas, but 50 steps" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["output", "progressive"])
def test_a_student_of_a_flow_learns_from_its_teacher(kind: str, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path, diffusion=FLOW)
    spec: dict[str, Any] = {"kind": kind, "teacher": str(teacher), "guidance_scale": 2.0}
    if kind == "progressive":
        spec |= {"sampling_steps": [4, 2], "round_steps": 8}
    run = tiny_config(tmp_path, diffusion=FLOW, distillation=spec, steps=16)
    trainer = Trainer(run)
    assert trainer.objective is not None
    batch = trainer.objective.prepare_batch(trainer.source.make(0))
    row = trainer.noise.at(batch.t)
    target = trainer.objective.target(batch, row.noisy(batch.x0, batch.noise))
    model = load_model(teacher)
    if kind == "progressive":
        assert set(batch.t.tolist()) <= {1.0, 0.75, 0.5, 0.25}
    table = {t: [t, t - 0.125] if kind == "progressive" else [t] for t in batch.t.tolist()}
    for k, levels in enumerate(table[t] for t in batch.t.tolist()):
        embedding = model.network.embed(batch.labels[k : k + 1])
        network = Denoiser(model.network, model.schedule, Conditions((embedding,)), Guidance(2.0))
        x = start = row.noisy(batch.x0, batch.noise)[k : k + 1]
        with torch.no_grad():
            for sigma in levels:
                # Euler: x moves by the velocity, or at once to the image where there is one call.
                image = (x - sigma * network(x, sigma)).clip(-1, 1)
                x = x + 0.125 * (image - x) / sigma
        if kind == "progressive":
            image = start + (x - start) * levels[0] / 0.25
        torch.testing.assert_close(target[k : k + 1].clip(-1, 1), image.clip(-1, 1), rtol=1e-4, atol=1e-4)
    training.train(run)
    assert load_model(run.output).manifest.defaults.guidance_scale == 1.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"diffusion": {**FLOW, "prediction": "epsilon"}}, "prediction of a flow must be flow, v or x0"),
        (
            {"diffusion": {**FLOW, "noise_input": "timestep"}},
            "noise_input of a flow must be sigma or 1-sigma",
        ),
        ({"diffusion": {**FLOW, "noise_scale": 0}}, "diffusion.noise_scale"),
        ({"diffusion": {**FLOW, "output_sign": 0}}, "diffusion.output_sign"),
        ({"diffusion": {**FLOW, "learn_sigma": True}}, "learn_sigma is for tables of timesteps"),
        ({"diffusion": {**FLOW, "log_snr_shift": 1}}, "log_snr_shift is for tables of timesteps"),
        ({"diffusion": {**FLOW, "sigma_grid": {"shift": 0}}}, "diffusion.sigma_grid: shift must be above 0"),
        (
            {"diffusion": {**FLOW, "sigma_grid": {"scheduler": {**EULER, "shfit": 3.0}}}},
            "diffusion.sigma_grid: scheduler configuration: field shfit: a FlowMatchEuler",
        ),
        ({"diffusion": FLOW, "noise_shift": 0}, "noise_shift"),
    ],
)
def test_a_flow_that_cannot_be_is_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config_file({**tiny_run(tmp_path), **changes}, tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
