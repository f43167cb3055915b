"""Imports of SiT and REPA: the flow that their papers write down, sampled from their own weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditserve.model.convert import main
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise, initial_noise
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model
from ditserve.model.weights.official import to_official
from tests.model.weights.reference import official_dit

Make = Callable[..., DiT]
SIT = DiTConfig(image_size=(8, 8), hidden_size=16, depth=2, num_heads=2, classes=(5,))
REPA = DiTConfig(image_size=(8, 8), hidden_size=16, depth=2, num_heads=2, classes=(5,), learn_sigma=False)
STEPS, SCALE, SEED, LABEL = 7, 1.8, 3, 2
SIT_ARGUMENTS = {"path_type": "Linear", "prediction": "velocity", "num_classes": 5}
REPA_ARGUMENTS = {"path_type": "linear", "prediction": "v", "num_classes": 5}


def imported(folder: Path, stored: Any, *options: str) -> int:
    torch.save(stored, folder / "weights.pt")
    command = ["import", str(folder / "weights.pt"), str(folder / "bundle"), "--licence", "MIT"]
    return main([*command, "--heads", "2", "--num-classes", "5", *options])


def drawn(bundle: Path) -> Tensor:
    """Return our sample by Euler's method."""
    model = load_model(bundle)
    manifest, schedule = model.manifest, model.schedule
    conditions = Conditions((model.network.embed(torch.tensor([[LABEL]])),))
    guidance = Guidance(SCALE, channels=manifest.diffusion.guidance_channels)
    table = step_table("euler", noise_levels("uniform", STEPS, schedule), schedule)
    denoiser = Denoiser(model.network, schedule, conditions, guidance)
    *_, image = denoise(denoiser, table, [SEED], clip_x0=manifest.diffusion.clip_x0)
    return image


def guided(state: dict[str, Tensor], x: Tensor, time: float, *, channels: int) -> Tensor:
    """Return the output of the reference, guided on the first channels, with what follows the label's."""
    conditional, null = (
        official_dit(state, x, torch.tensor([time]), torch.tensor([label]), heads=2)[:, :4]
        for label in (LABEL, 5)
    )
    mixed = null + SCALE * (conditional - null)
    return torch.cat([mixed[:, :channels], conditional[:, channels:]], dim=1)


@pytest.mark.parametrize("options", [(), ("--function", "sit")])
def test_an_sit_runs_from_noise_at_time_0_to_the_image_at_1(
    network: Make, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    state = to_official(network(SIT).state_dict(), SIT)
    told: dict[str, Any] = {"ema": state}
    if not options:
        told["args"] = argparse.Namespace(**SIT_ARGUMENTS)
    assert imported(tmp_path, told, *options) == 0
    assert "it is a flow as sit trains" in capsys.readouterr().out
    x = torch.from_numpy(initial_noise(SEED, (4, 8, 8)))[None]
    with torch.no_grad():
        for k in range(STEPS):
            # SiT's velocity points from noise to image; it guides three of four channels.
            x = x + guided(state, x, k / STEPS, channels=3) / STEPS
    torch.testing.assert_close(drawn(tmp_path / "bundle"), x, rtol=1e-4, atol=1e-4)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.diffusion.noise_input == "1-sigma"
    assert not manifest.config.learn_sigma
    assert (manifest.defaults.solver, manifest.defaults.grid) == ("euler", "uniform")


@pytest.mark.parametrize("options", [(), ("--function", "repa")])
def test_a_repa_runs_from_noise_at_time_1_to_the_image_at_0(
    network: Make, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    state = to_official(network(REPA).state_dict(), REPA)
    told: dict[str, Any] = {"ema": {**state, "projectors.0.0.weight": torch.zeros(2, 2)}}
    if not options:
        told["args"] = argparse.Namespace(**REPA_ARGUMENTS)
    assert imported(tmp_path, told, *options) == 0
    assert "it is a flow as repa trains" in capsys.readouterr().out
    x = torch.from_numpy(initial_noise(SEED, (4, 8, 8)))[None]
    with torch.no_grad():
        for k in range(STEPS):
            x = x - guided(state, x, 1 - k / STEPS, channels=4) / STEPS
    torch.testing.assert_close(drawn(tmp_path / "bundle"), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ({}, (), "say --function sit, repa or lightningdit for a flow"),
        ({}, ("--function", "diffusers"), "is in the official layout"),
        (SIT_ARGUMENTS, ("--function", "repa"), "is a flow as sit trains"),
        ({"prediction": "epsilon"}, ("--function", "sit"), "it predicts the noise: leave out --function sit"),
    ],
)
def test_a_function_that_is_not_told_or_contradicted_is_refused_in_one_sentence(
    network: Make,
    tmp_path: Path,
    arguments: dict[str, Any],
    options: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = to_official(network(SIT).state_dict(), SIT)
    assert imported(tmp_path, {"ema": state, "args": arguments}, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not (tmp_path / "bundle").exists()
