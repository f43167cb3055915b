"""Networks and bundles that are small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.bundle import write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Defaults, Factor, Manifest, StateTensor
from tests.model.nets.unet_cases import TINY_UNET

_TINY = DiTConfig(
    image_size=(8, 8),
    patch_size=2,
    in_channels=3,
    hidden_size=32,
    depth=3,
    num_heads=2,
    classes=(5, 3),
    learn_sigma=False,
)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., DiTConfig]:
    """A function that returns a configuration of three blocks and two factors, with changes."""

    def make(**changes: Any) -> DiTConfig:
        return replace(_TINY, **changes)

    return make


@pytest.fixture(scope="session")
def network() -> Callable[..., DiT]:
    """A function that returns a DiT with random parameters: a part that starts at zero would hide a fault."""

    def make(config: DiTConfig = _TINY, seed: int = 0) -> DiT:
        generator = torch.Generator().manual_seed(seed)
        dit = DiT(config).eval()
        for parameter in dit.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return dit

    return make


@pytest.fixture
def bundle(network: Callable[..., DiT], tmp_path: Path) -> Path:
    """A bundle of a tiny random pixel model: weights and manifest, two factors, three steps by default."""
    return write_bundle(network(), tmp_path / "bundle")


@pytest.fixture
def unet_bundle(tmp_path: Path) -> Path:
    """The same bundle of a U-Net."""
    torch.manual_seed(0)
    unet = UNet(TINY_UNET)
    # The last layer starts at zero, which would give black pictures.
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return write_bundle(unet, tmp_path / "unet")


def write_bundle(network: Network, folder: Path) -> Path:
    folder.mkdir()
    save_file(network.state_dict(), folder / "weights.safetensors")
    config = network.config
    manifest = Manifest(
        name="tiny",
        version="1",
        description="",
        config=config,
        diffusion=DiffusionSpec(schedule="cosine", prediction="x0"),
        factors=(
            Factor(name="label", classes=("cat", "dog", "fox", "owl", "bee")),
            Factor(name="style", classes=("flat", "shaded", "line")),
        ),
        embedding_size=config.hidden_size,
        state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
        defaults=Defaults(
            steps=3, solver="ddim", grid="trailing", guidance_scale=2, guidance_interval=(0, 1)
        ),
        licence="MIT",
    )
    write_manifest(folder, manifest)
    return folder
