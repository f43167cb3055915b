"""The golden image of a bundle: a sample drawn by PyTorch, which the service's canary draws repeatedly."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from ditserve.model.nets.autoencoder import open_autoencoder
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.sampling.sheet import to_pixels
from ditserve.model.spec.bundle import GOLDEN, Golden
from ditserve.model.spec.diffusion import grid
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.loaded_model import LoadedModel

STEPS, SEED = 20, 0


def write_golden(model: LoadedModel, folder: Path, vae: Path | None = None) -> Golden | None:
    """Draw a sample of the first class of every factor into `folder`.

    Return None for a model on latents if `vae`, the folder of its autoencoder, is not given.

    Raises:
        AutoencoderError: the autoencoder cannot be opened.
    """
    manifest, network = model.manifest, model.network
    if manifest.decoder != "identity" and vae is None:
        return None
    defaults = manifest.defaults
    labels = torch.zeros((1, len(manifest.factors)), dtype=torch.int64)
    # A few-step model is drawn with its own number of steps: with more it would not draw what it was trained
    # to.
    steps = min(STEPS, defaults.steps)
    table = step_table(defaults.solver, grid(defaults.grid, steps, model.schedule.timesteps), model.schedule)
    guidance = Guidance(
        defaults.guidance_scale, defaults.guidance_interval, manifest.diffusion.guidance_channels
    )
    with torch.no_grad():
        conditions = Conditions((network.embed(labels),))
        denoiser = Denoiser(network, model.schedule, conditions, guidance)
        *_, latent = denoise(denoiser, table, [SEED], clip_x0=manifest.diffusion.clip_x0)
        image = open_autoencoder(manifest.decoder, vae, manifest.latents).decode(latent)
    Image.fromarray(to_pixels(image)[0]).save(folder / GOLDEN)
    return Golden(
        condition={factor.name: factor.classes[0] for factor in manifest.factors},
        seed=SEED,
        steps=steps,
        solver=defaults.solver,
        grid=defaults.grid,
        guidance_scale=defaults.guidance_scale,
    )
