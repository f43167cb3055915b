"""Folders of diffusers whose scheduler is a flow's: its grid and what the network is told come with it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from ditserve.model.convert import main
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise, initial_noise
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.sigma_grids import DynamicShift
from ditserve.model.spec.solvers import step_table
from ditserve.model.spec.table_schedulers import PUBLISHED, SAMPLING
from ditserve.model.train.load import load_model
from ditserve.model.weights.diffusers import to_diffusers

Make = Callable[..., DiT]
SMALL = DiTConfig(
    image_size=(8, 8),
    hidden_size=16,
    depth=2,
    num_heads=2,
    classes=(5,),
    frequency_shift=1,
    mlp_norm_eps=1e-5,
)
STEPS, SCALE, SEED, LABEL = 5, 1.8, 3, 2
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 2.0,
}
DYNAMIC = {**EULER, "use_dynamic_shifting": True}


@pytest.fixture
def pipeline(network: Make, tmp_path: Path) -> Path:
    """A pipeline's folder with a DiT as diffusers makes it, which has a learned variance."""
    state, fields = to_diffusers(network(SMALL).state_dict(), SMALL)
    (tmp_path / "pipe/transformer").mkdir(parents=True)
    (tmp_path / "pipe/scheduler").mkdir()
    (tmp_path / "pipe/transformer/config.json").write_text(json.dumps(fields))
    save_file(state, tmp_path / "pipe/transformer/diffusion_pytorch_model.safetensors")
    return tmp_path / "pipe"


def imported(pipeline: Path, scheduler: dict[str, Any], *options: str) -> int:
    (pipeline / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return main(["import", str(pipeline), str(pipeline.parent / "bundle"), "--licence", "MIT", *options])


def test_a_flow_is_drawn_as_diffusers_draws_it(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert imported(pipeline, EULER) == 0
    printed = capsys.readouterr().out
    assert "FlowMatchEulerDiscreteScheduler says that it is a flow with a shift of 3; taken as" in printed
    assert "since the pipeline's scheduler is a flow's" in printed
    loaded = load_model(pipeline.parent / "bundle")
    schedule, defaults = loaded.schedule, loaded.manifest.defaults
    conditions = Conditions((loaded.network.embed(torch.tensor([[LABEL]])),))
    denoiser = Denoiser(loaded.network, schedule, conditions, Guidance(SCALE))
    table = step_table(defaults.solver, noise_levels(defaults.grid, STEPS, schedule), schedule)
    *_, image = denoise(denoiser, table, [SEED], clip_x0=loaded.manifest.diffusion.clip_x0)

    network = DiTTransformer2DModel.from_pretrained(pipeline / "transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline / "scheduler")
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(initial_noise(SEED, (4, 8, 8)))[None]
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = network(torch.cat([x, x]), t.expand(2), torch.tensor([LABEL, 5])).sample[:, :4]
            conditional, null = both.chunk(2)
            x = scheduler.step(null + SCALE * (conditional - null), t, x).prev_sample
    assert (image - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("scheduler", [UNIPC, DYNAMIC])
def test_other_flow_schedulers_give_their_grid(pipeline: Path, scheduler: dict[str, Any]) -> None:
    assert imported(pipeline, scheduler) == 0
    spec = Bundle.open(pipeline.parent / "bundle").manifest.diffusion
    assert spec.sigma_grid is not None
    assert (spec.schedule, spec.prediction, spec.noise_scale) == ("flow", "flow", 1000.0)
    if scheduler is UNIPC:
        assert spec.sigma_grid.shift == 2.0
    else:
        assert spec.sigma_grid.dynamic == DynamicShift()
        assert spec.sigma_grid.tokens == 16


def test_the_network_is_told_sigma_times_the_timesteps_of_the_training(pipeline: Path) -> None:
    assert imported(pipeline, {**EULER, "num_train_timesteps": 500}) == 0
    assert Bundle.open(pipeline.parent / "bundle").manifest.diffusion.noise_scale == 500.0


@pytest.mark.parametrize(
    ("scheduler", "options", "sentence"),
    [
        ({**EULER, "shift": 0}, (), "scheduler_config.json: scheduler configuration: field shift: Input"),
        ({**EULER, "shift": -2.0}, (), "field shift: Input should be greater than 0"),
        ({**EULER, "shfit": 3.0}, (), "field shfit: a FlowMatchEulerDiscreteScheduler has no such field"),
        ({**EULER, "shift": "3"}, (), "field shift: Input should be a valid number"),
        ({**EULER, "invert_sigmas": True}, (), "field invert_sigmas"),
        ({**EULER, "num_train_timesteps": 0}, (), "field num_train_timesteps"),
        ({**EULER, "num_train_timesteps": 10**9}, (), "field num_train_timesteps: must be at most a million"),
        ({**EULER, "_class_name": "FlowMatchLCMScheduler"}, (), "field _class_name: 'FlowMatchLCMScheduler'"),
        ({**UNIPC, "use_flow_sigmas": False}, (), "field use_flow_sigmas"),
        ({"prediction_type": "flow_prediction"}, (), "field _class_name"),
        (EULER, ("--function", "published"), "which the official DiT is not: leave out --function"),
        (EULER, ("--function", "sit"), "is in diffusers' layout: --function sit is for a file of sit"),
        (EULER, ("--predicts-noise",), "is of a flow: leave out --predicts-noise"),
        (EULER, ("--size", "16", "16"), "says a size of 8x8: leave out --size"),
        (EULER, ("--heads", "4"), "says 2 heads: leave out --heads"),
    ],
)
def test_a_scheduler_that_gives_no_grid_or_contradicts_is_refused_in_one_sentence(
    scheduler: dict[str, Any],
    options: tuple[str, ...],
    sentence: str,
    pipeline: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert imported(pipeline, scheduler, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not (pipeline.parent / "bundle").exists()


def test_every_field_of_the_schedulers_of_a_table_is_known() -> None:
    """A field that diffusers adds is refused until somebody has looked at it."""
    names = "DDIM DDPM DPMSolverMultistep DPMSolverSinglestep EulerDiscrete EulerAncestralDiscrete PNDM "
    names += "HeunDiscrete LMSDiscrete UniPCMultistep DEISMultistep"
    for name in names.split():
        fields = inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters
        assert fields.keys() - {"self"} <= PUBLISHED.keys() | SAMPLING
