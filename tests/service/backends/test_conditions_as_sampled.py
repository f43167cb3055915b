"""Composed and layered conditions, decay and negative prompts: in the service as in `model.sample`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.ladder import LadderOptions
from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.model.nets.factory import NetworkConfig
from ditserve.model.sampling.denoise import Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import combine_conditions, label_tensor
from ditserve.model.sampling.windows import WindowDenoiser
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.sigma_grids import DynamicShift, SigmaGrid
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import save_model
from ditserve.service.backends import Floats, load_backend
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.rung import Consent, Rung
from tests.export.tiny import CONFIG, tiny_source
from tests.model.nets.unet_cases import TINY_UNET
from tests.service.backends.drawing import Letters, drawn

# Model → its network, and its diffusion.
MODELS: dict[str, tuple[NetworkConfig, DiffusionSpec]] = {
    "texts": (
        replace(CONFIG, text_size=6),
        DiffusionSpec(schedule="cosine", prediction="x0", log_snr_shift=-1.0, guidance_channels=2),
    ),
    "flow": (
        CONFIG,
        DiffusionSpec(
            schedule="flow", prediction="flow", sigma_grid=SigmaGrid(dynamic=DynamicShift(), tokens=256)
        ),
    ),
    "unet": (
        replace(TINY_UNET, classes=(4, 2), learn_sigma=False),
        DiffusionSpec(schedule="cosine", prediction="v"),
    ),
}
EXPORTED = "texts"  # the torch backend needs no graphs
TERMS = (ConditionTerm((0, 1), 2.0), ConditionTerm((1, None), 1.0), ConditionTerm((3, 0), -0.5))
LABELS = (ConditionTerm((0, 1)),)
LAYERS = (ConditionTerm((0, 1)), ConditionTerm((3, None)))
WORDS = (ConditionTerm((0, 1), 1.5, "a fox"), ConditionTerm((None, None), -0.5, "snow"))
# Name → (model, fields of a request).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "composed": ("texts", {"condition": TERMS, "mix": "compose"}),
    "composed in windows": (
        "texts",
        {"condition": TERMS, "mix": "compose", "size": (16, 28), "windows": True},
    ),
    "composed without guidance": ("texts", {"condition": TERMS, "mix": "compose", "guidance_scale": 1.0}),
    "layered": ("texts", {"condition": LAYERS, "mix": "layers"}),
    "layers of a U-Net": ("unet", {"condition": LAYERS, "mix": "layers"}),
    "composed by a flow": ("flow", {"condition": TERMS, "mix": "compose"}),
    "windows of a flow": ("flow", {"condition": LABELS, "size": (16, 28), "windows": True}),
    "layered by a flow": ("flow", {"condition": LAYERS, "mix": "layers"}),
    "negative prompt": ("texts", {"condition": WORDS[:1], "negative_prompt": "fog"}),
    "composed with a negative prompt": (
        "texts",
        {"condition": WORDS, "mix": "compose", "negative_prompt": "fog"},
    ),
    "layered texts": ("texts", {"condition": (replace(WORDS[0], weight=1.0), LAYERS[1]), "mix": "layers"}),
    "mixed": ("texts", {"condition": (WORDS[0], LAYERS[1]), "mix": "spherical", "negative_prompt": "fog"}),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    options = ExportOptions(
        weights="fp32",
        half="none",
        golden=False,
        trajectories=TrajectorySettings(samples=2, steps=4),
        ladder=LadderOptions("none"),
    )
    for name, (config, diffusion) in MODELS.items():
        source = tiny_source(config)
        grid = "uniform" if diffusion.schedule == "flow" else "trailing"
        defaults = source.manifest.defaults.model_copy(update={"grid": grid})
        changes = {"diffusion": diffusion, "defaults": defaults, "ladder": ()}
        source = replace(source, manifest=source.manifest.model_copy(update=changes))
        folders[name] = tmp_path_factory.mktemp("conditions") / name
        if name == EXPORTED:
            export_bundle(source, folders[name], options)
        else:
            save_model(folders[name], source)
    return folders


def request_of(name: str, case: str, grid: str, **changes: Any) -> SampleRequest:
    rung = Rung("dpmpp-2m-5", "dpmpp-2m", 5, grid, (0.1, 0.9), 0.0, guidance_decay=0.75)
    fields: dict[str, Any] = {"mix": "linear", "guidance_scale": 2.5, **CASES[case][1], **changes}
    return SampleRequest(
        id=name,
        seed=3,
        rung=rung,
        requested=rung,
        previews=0,
        deadline_at=None,
        allow_degraded=False,
        consent=Consent(),
        **fields,
    )


@torch.no_grad()
def sampled(folder: Path, request: SampleRequest) -> Floats:
    """Return the latent that `model.sample` makes of the same."""
    model = load_model(folder)
    network, classes = model.network, model.network.config.classes
    rows = [*request.condition, ConditionTerm((None,) * len(classes), text=request.negative_prompt)]
    text = torch.from_numpy(np.stack([Letters().encode(term.text) for term in rows]))
    labels = label_tensor([term.labels for term in rows], classes)
    *parts, negative = network.embed(labels, text if network.config.text_size else None)
    weights = [term.weight for term in request.condition]
    conditions = combine_conditions(
        parts, weights, request.mix, 1, negative=negative if request.negative_prompt else None
    )
    rung = request.rung
    channels = model.manifest.diffusion.guidance_channels
    guidance = Guidance(request.guidance_scale, rung.guidance_interval, channels, rung.guidance_decay)
    table = step_table(rung.solver, noise_levels(rung.grid, rung.steps, model.schedule), model.schedule)
    kind = WindowDenoiser if request.windows else Denoiser
    denoiser = kind(network, model.schedule, conditions, guidance)
    clip = model.manifest.diffusion.clip_x0
    *_, image = denoise(denoiser, table, [request.seed], request.size, clip_x0=clip)
    return np.asarray(image[0].numpy(), np.float32)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (backend, case)
        for case in CASES
        for backend in ("onnx", "torch")
        if backend == "torch" or CASES[case][0] == EXPORTED
    ],
)
def test_the_engine_draws_what_the_model_samples(backend: str, case: str, bundles: dict[str, Path]) -> None:
    folder = bundles[CASES[case][0]]
    network = load_backend(backend, Bundle.open(folder), threads=1)
    grid = network.manifest.defaults.grid
    request = request_of("asked/0", case, grid)
    label = (ConditionTerm((2, 1)),)
    plain = request_of("plain/0", case, grid, condition=label, mix="linear", negative_prompt="")
    other = replace(plain, id="other/0", size=None, windows=False)
    made = drawn(network, [plain, request, other], 1 << 20)
    np.testing.assert_allclose(made["asked/0"], sampled(folder, request), atol=1e-4)
    np.testing.assert_allclose(made["plain/0"], sampled(folder, plain), atol=1e-4)
    assert np.abs(made["asked/0"] - made["plain/0"]).max() > 1e-2
    # Without the cache, the same bits.
    alone = drawn(network, [request], 0)["asked/0"]
    np.testing.assert_array_equal(drawn(network, [request], 1 << 20)["asked/0"], alone)
    np.testing.assert_allclose(made["asked/0"], alone, atol=1e-4)
    network.close()
