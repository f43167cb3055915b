"""The golden image of a bundle: a sample drawn by PyTorch, which the service's canary draws repeatedly."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from ditserve.model.nets.autoencoder import open_decoder
from ditserve.model.nets.cost import cost
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.sampling.sheet import to_pixels
from ditserve.model.spec.bundle import GOLDEN
from ditserve.model.spec.class_names import class_reference
from ditserve.model.spec.grids import choose_grid, noise_levels
from ditserve.model.spec.manifest import Golden
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.loaded_model import LoadedModel

STEPS, SEED = 20, 0
# The most floating-point operations of the image, which the service draws again and again: a minute or two of
# one core. They are all 20 steps of a DiT-B/2, and four of a DiT-XL/2.
FLOPS = 2e12


def write_golden(model: LoadedModel, folder: Path, vae: Path | None = None) -> Golden | None:
    """Draw a sample of the first class of every factor into `folder`, in fewer steps if they are costly.

    Return None for clips and volumes, which are no picture to compare, and for a model on latents if `vae`,
    the folder of its autoencoder, is not given.

    Raises:
        AutoencoderError: the autoencoder cannot be opened.
    """
    manifest, network = model.manifest, model.network
    if manifest.first_axis is not None or (manifest.decoder != "identity" and vae is None):
        return None
    defaults = manifest.defaults
    labels = torch.zeros((1, len(manifest.factors)), dtype=torch.int64)
    solver, schedule = defaults.solver, model.schedule
    # A few-step model is drawn with its own number of steps: with more it would not draw what it was trained
    # to.
    steps = min(STEPS, defaults.steps, affordable_steps(network.config, defaults.guidance_scale))
    if schedule.step_counts:
        steps = max((count for count in schedule.step_counts if count <= steps), default=defaults.steps)
    kind = choose_grid(None, stated=defaults.grid, solver=solver, steps=steps, schedule=schedule)
    table = step_table(solver, noise_levels(kind, steps, schedule), schedule)
    guidance = Guidance(
        defaults.guidance_scale, defaults.guidance_interval, manifest.diffusion.guidance_channels
    )
    with torch.no_grad():
        conditions = Conditions((network.embed(labels),))
        denoiser = Denoiser(network, model.schedule, conditions, guidance)
        *_, latent = denoise(denoiser, table, [SEED], clip_x0=manifest.diffusion.clip_x0)
        image = open_decoder(manifest, vae).decode(latent)
    Image.fromarray(to_pixels(image)[0]).save(folder / GOLDEN)
    return Golden(
        condition={factor.name: str(class_reference(factor, 0)) for factor in manifest.factors},
        seed=SEED,
        steps=steps,
        solver=solver,
        grid=kind,
        guidance_scale=defaults.guidance_scale,
    )


def affordable_steps(config: NetworkConfig, guidance_scale: float) -> int:
    """Return the steps that cost no more than `FLOPS`, at least one.

    A guided step of a DiT-XL/2 at 256 px is two rows of 237 GFLOPs, so 2,000 / 474 gives 4.
    """
    rows = 1 if guidance_scale == 1 else 2
    return max(1, int(FLOPS // (rows * cost(config).flops)))
