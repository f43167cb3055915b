"""A bundle of random weights that draws 16×16 pictures from texts, over latents of a small autoencoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.ladder import LadderOptions
from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.model.nets.small_autoencoder import (
    SmallAutoencoder,
    SmallAutoencoderConfig,
    save_small_autoencoder,
)
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import LatentSpec, StateTensor
from ditserve.model.train.loaded_model import LoadedModel
from tests.export.tiny import cached, tiny_network, tiny_source

# MiniLM's embeddings have 384 numbers.
CONFIG = DiTConfig(
    image_size=(8, 8),
    patch_size=2,
    in_channels=4,
    hidden_size=32,
    depth=4,
    num_heads=2,
    classes=(4, 2),
    text_size=384,
    text_tokens=2,
    learn_sigma=False,
    layout_rank=4,
)
PROMPTS = ("a red fox", "a green apple on a table", "a bicycle")


def cached_prompted_bundle(cache: Path) -> Path:
    """Return the folder of the bundle: exported once per version of the code, and kept in `cache`."""

    def make(folder: Path) -> None:
        with TemporaryDirectory() as autoencoder:
            _export(folder, Path(autoencoder))

    return cached(cache, "prompted", make, Path(__file__))


def _export(folder: Path, autoencoder: Path) -> None:
    torch.manual_seed(0)
    config = SmallAutoencoderConfig(latent_channels=4, widths=(8,), blocks=(1,))
    save_small_autoencoder(autoencoder, SmallAutoencoder(config), {})
    pixels = tiny_source(replace(CONFIG, in_channels=3)).manifest
    changes = {
        "name": "prompted",
        "config": CONFIG,
        "decoder": "small",
        "latents": LatentSpec(shift=(0.0,) * 4, scale=(1.0,) * 4, factor=config.factor),
        "embedding_size": CONFIG.embedding_size,
        "state": tuple(StateTensor(name=name, shape=shape) for name, shape in CONFIG.state()),
        "diffusion": pixels.diffusion.model_copy(update={"clip_x0": False}),
    }
    source = LoadedModel(tiny_network(CONFIG), pixels.model_copy(update=changes))
    options = ExportOptions(
        weights="fp32",
        half="none",
        trajectories=TrajectorySettings(samples=1, steps=3),
        vae=autoencoder,
        golden=False,
        ladder=LadderOptions("none"),
    )
    export_bundle(source, folder, options)
