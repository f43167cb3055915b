"""A LightningDiT on its whole way: import, export to ONNX, the service's engine; against its own formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from ditserve.export.onnx import main as export
from ditserve.model.convert import main as convert
from ditserve.model.sampling.denoise import initial_noise
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import load_backend
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.rung import Consent, Rung
from tests.model.weights.lightningdit_reference import (
    CHANNELS,
    SIDE,
    lightning_config,
    lightning_run,
    random_lightningdit,
)
from tests.service.backends.drawing import drawn

SEED, LABEL = 7, 4


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of the kind of LightningDiT's: five channels here, 16 pixels on a side."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        norm_num_groups=4,
        latent_channels=CHANNELS,
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_lightningdit_is_served_as_its_own_code_draws_it(vae: Path, tmp_path: Path) -> None:
    state, config = random_lightningdit(qk_norm=True), lightning_config(model={"use_qknorm": True})
    torch.save({"ema": state, "config": config}, tmp_path / "0080000.pt")
    mean, deviation = torch.linspace(-1, 1, CHANNELS), torch.linspace(0.5, 2, CHANNELS)
    torch.save({"mean": mean, "std": deviation}, tmp_path / "latents_stats.pt")
    imported, bundle = str(tmp_path / "imported"), tmp_path / "bundle"
    assert convert(["import", str(tmp_path / "0080000.pt"), imported, "--licence", "MIT"]) == 0
    quick = ["--weights", "fp32", "--half", "none", "--ladder", "none", "--golden", "none"]
    quick += ["--samples", "2", "--steps", "3"]
    assert export([imported, "--out", str(bundle), "--vae", str(vae), *quick]) == 0

    noise = torch.from_numpy(initial_noise(SEED, (CHANNELS, SIDE, SIDE)))[None]
    expected = lightning_run(state, noise, LABEL, config["sample"])[0]
    backend = load_backend("onnx", Bundle.open(bundle), threads=1)
    defaults = backend.manifest.defaults
    rung = Rung("own", defaults.solver, defaults.steps, defaults.grid, defaults.guidance_interval, 0.0)
    request = SampleRequest(
        id="a/0",
        seed=SEED,
        condition=(ConditionTerm((LABEL,)),),
        mix="linear",
        guidance_scale=defaults.guidance_scale,
        rung=rung,
        requested=rung,
        previews=0,
        deadline_at=None,
        allow_degraded=False,
        consent=Consent(),
    )
    latent = drawn(backend, [request])["a/0"]
    assert np.abs(latent - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())
    pixels = backend.decode(latent[None])[0]
    backend.close()
    decoder = AutoencoderKL.from_pretrained(vae)
    image = decoder.decode((expected * deviation[:, None, None] + mean[:, None, None])[None]).sample[0]
    scaled = ((image.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    assert pixels.shape == (16 * SIDE, 16 * SIDE, 3)
    assert np.abs(pixels - scaled).max() <= 1.0
