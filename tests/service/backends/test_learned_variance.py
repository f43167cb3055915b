"""The published sampling, DDPM with a learned variance, in the service and in `model.sample`: one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.grids import grid
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model
from ditserve.service.backends import Floats, load_backend
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from ditserve.service.rung import Consent, Rung
from tests.export.tiny import CONFIG, tiny_source

RUNGS = [
    Rung("ddpm-8", "ddpm", 8, "respaced", (0.1, 0.8), 0.0),
    Rung("ddim-8", "ddim", 8, "trailing", (0.0, 1.0), 0.0),
]
LABELS = (2, 1)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bundle that learned its variance, guided on two of its three channels."""
    source = tiny_source(replace(CONFIG, learn_sigma=True, head_channels=0))
    diffusion = DiffusionSpec(schedule="linear", prediction="epsilon", learn_sigma=True, guidance_channels=2)
    source = replace(source, manifest=source.manifest.model_copy(update={"diffusion": diffusion}))
    folder = tmp_path_factory.mktemp("learned") / "bundle"
    trajectories = TrajectorySettings(samples=2, steps=4)
    export_bundle(source, folder, ExportOptions(half="none", golden=False, trajectories=trajectories))
    return folder


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_the_engine_draws_what_the_model_samples(name: str, learned: Path) -> None:
    model = load_model(learned)
    backend = load_backend(name, Bundle.open(learned), threads=1)
    scheduler, ladder = Scheduler(max_rows=8), Ladder(())
    engine = Engine(
        backend=backend,
        conditions=ConditionCaches(backend),
        scheduler=scheduler,
        planner=Planner(ladder),
        ladder=ladder,
        costs=CostModel(),
        schedule=model.schedule,
        clock=lambda: 0.0,
    )
    for rung in RUNGS:
        engine.add(_request(rung))
    made: dict[str, Floats] = {}
    while not engine.idle:
        made |= {sample.id: sample.latent for sample in engine.step().finished}
    with torch.no_grad():
        conditions = Conditions((model.network.embed(torch.tensor([LABELS])),))
    for rung in RUNGS:
        guidance = Guidance(2.0, rung.guidance_interval, channels=2)
        table = step_table(rung.solver, grid(rung.grid, rung.steps), model.schedule)
        *_, image = denoise(Denoiser(model.network, model.schedule, conditions, guidance), table, [3])
        np.testing.assert_allclose(made[rung.name], image[0].numpy(), atol=1e-4)
    backend.close()


def _request(rung: Rung) -> SampleRequest:
    return SampleRequest(
        id=rung.name,
        condition=(ConditionTerm(LABELS),),
        mix="linear",
        seed=3,
        rung=rung,
        requested=rung,
        guidance_scale=2.0,
        previews=0,
        deadline_at=None,
        allow_degraded=False,
        consent=Consent(),
    )
