"""Image sizes: what a request writes ("128x64"), and the latent size that workers are asked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod

from model.bundle import Manifest
from service.jobs import WorkerState

UPSCALE = {"identity": 1, "sd-vae": 8, "small": 8}  # pixels a side of one latent pixel


def written(manifest: Manifest) -> str:
    """Width x height of a model's own images, in pixels."""
    height, width = manifest.config.image_size
    factor = UPSCALE[manifest.decoder]
    return f"{width * factor}x{height * factor}"


def size_step(manifest: Manifest, workers: Sequence[WorkerState]) -> int | None:
    """Pixels that every side must be a multiple of for all workers to make it; None if some have one size only."""
    multiples = [each.network.size_multiple for each in workers if each.network.size_multiple is not None]
    if len(multiples) < len(workers) or not workers:
        return None
    return lcm(*multiples) * UPSCALE[manifest.decoder]


def latent_size(
    size: str, manifest: Manifest, workers: Sequence[WorkerState], *, max_area: float
) -> tuple[int, int]:
    """Height and width in latent pixels of `size`, at most `max_area` times as many as the model's own.

    Raises:
        ValueError: the workers do not make it; the message is one sentence for the caller.
    """
    width, height = (int(side) for side in size.split("x"))
    step = size_step(manifest, workers)
    if step is None:
        raise ValueError(f"This model makes {written(manifest)} images only.")
    if not width or not height or width % step or height % step:
        raise ValueError(f"Width and height must be multiples of {step}.")
    factor = UPSCALE[manifest.decoder]
    latent = height // factor, width // factor
    if row_cost(latent, manifest) > max_area:
        pixels = int(max_area * prod(manifest.config.image_size)) * factor**2
        raise ValueError(f"At most {pixels} pixels in all.")
    return latent


def row_cost(size: tuple[int, int] | None, manifest: Manifest) -> float:
    """Tokens of a row of a latent size, in rows of the model's own."""
    return 1.0 if size is None else prod(size) / prod(manifest.config.image_size)
