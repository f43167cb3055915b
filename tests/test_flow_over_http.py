"""A flow from its export to a picture over HTTP, by either backend, as `model.sample` draws it.

Of one condition, of several that are composed or layered, and with decaying guidance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.ladder import LadderOptions
from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.model.sampling.denoise import Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import combine_conditions
from ditserve.model.sampling.sheet import to_pixels
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.mixing import Combine
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model
from tests.model.train.distillation.distillation_cases import write_teacher
from tests.test_end_to_end import Service, pixels

# Told 1 - sigma, with the output's sign turned: what is most easily got wrong.
FLOW = {"schedule": "flow", "prediction": "flow", "noise_input": "1-sigma", "output_sign": -1}
BODY = {"condition": {"label": "b"}, "seed": 5, "sampler": "dpmpp-2m", "guidance_scale": 3.0}
INTERVAL = (0.3, 0.8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    options = ExportOptions(
        weights="fp32",
        half="none",
        trajectories=TrajectorySettings(samples=1, steps=10),
        ladder=LadderOptions("none"),
    )
    export_bundle(load_model(write_teacher(folder, diffusion=FLOW)), folder / "bundle", options)
    return folder / "bundle"


@torch.no_grad()
def expected(bundle: Path, levels: tuple[float, ...], *, mix: Combine = "linear", decay: float = 0.0) -> Any:
    """Return the pixels of the picture that torch draws offline, of label b alone or combined with a."""
    model = load_model(bundle)
    null = len(model.manifest.factors[1].classes)
    b, a = model.network.embed(torch.tensor([[1, null], [0, null]]))
    parts, weights = ([b], [1.0]) if mix == "linear" else ([b, a], [1.5, -0.5])
    conditions = combine_conditions(parts, weights, mix, 1)
    guidance = Guidance(3.0, INTERVAL, decay=decay)
    denoiser = Denoiser(model.network, model.schedule, conditions, guidance)
    *_, image = denoise(denoiser, step_table("dpmpp-2m", levels, model.schedule), [5])
    return to_pixels(image)[0].astype(np.int16)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_flow_is_served_as_it_is_sampled_offline(backend: str, bundle: Path, tmp_path: Path) -> None:
    service = Service(tmp_path / "log.txt", f"--bundle={bundle}", f"--backend={backend}")
    try:
        body = {**BODY, "guidance_interval": INTERVAL, "format": "png"}
        answer = service.client.post("/generate", json={**body, "steps": 6}).json()
        even = noise_levels("uniform", 6, load_model(bundle).schedule)
        assert np.abs(pixels(answer["images"][0]) - expected(bundle, even)).max() <= 1
        listed = (1.0, 0.85, 0.5, 0.2)
        answer = service.client.post("/generate", json={**body, "noise_levels": listed}).json()
        assert answer["steps_used"] == 4
        assert np.abs(pixels(answer["images"][0]) - expected(bundle, listed)).max() <= 1
        several = [{"label": "b"}, {"label": "a"}]
        weighted = [{**term, "weight": weight} for term, weight in zip(several, (1.5, -0.5), strict=True)]
        combined: list[tuple[Combine, list[dict[str, Any]]]] = [("layers", several), ("compose", weighted)]
        for mix, condition in combined:
            more = {"condition": condition, "mix": mix, "guidance_decay": 0.75, "steps": 6}
            answer = service.client.post("/generate", json={**body, **more}).json()
            drawn = pixels(answer["images"][0])
            assert np.abs(drawn - expected(bundle, even, mix=mix, decay=0.75)).max() <= 1
            assert np.abs(drawn - expected(bundle, even)).max() > 8
        for wrong in ({"noise_levels": [1.2, 0.5]}, {"noise_levels": [0.5, 0.9]}, {"grid": "trailing"}):
            refused = service.client.post("/generate", json={**body, **wrong})
            assert refused.status_code in (400, 422)
            assert next(iter(wrong)) in refused.json()["detail"]
        (model,) = service.client.get("/models").json()["models"]
        assert "uniform" in model["grids"]
    finally:
        service.stop()
