"""Image sizes: what a request writes ("128x64"), and the latents that workers denoise for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.sizes import Size
from ditserve.model.spec.windows import window_count
from ditserve.service.fleet import WorkerState


@dataclass(frozen=True, slots=True)
class OutputSize:
    """The size of a request's images.

    `size` is height and width in latent pixels, None for the model's own. `windows` is the number of windows
    in which an image is denoised, 0 if it is denoised as a whole. `row_cost` is the tokens of predicting it
    once, in rows of the model's own size.
    """

    size: Size | None = None
    windows: int = 0
    row_cost: float = 1.0


def size_text(manifest: Manifest, size: Size | None = None) -> str:
    """Return width x height in pixels of images of a latent size; None is the model's own."""
    height, width = picture_size(manifest, size)
    return f"{width}x{height}"


def picture_size(manifest: Manifest, size: Size | None = None) -> Size:
    """Return height and width in pixels of images of a latent size; None is the model's own."""
    height, width = size or manifest.config.image_size
    return height * manifest.upscale, width * manifest.upscale


def size_step(manifest: Manifest, workers: Sequence[WorkerState]) -> int | None:
    """Return the pixels that each side must be a multiple of, so that every worker can make the size.

    Return None if there is no worker, or one of them makes a single size only.
    """
    multiples = [
        worker.network.size_multiple for worker in workers if worker.network.size_multiple is not None
    ]
    if len(multiples) < len(workers) or not workers:
        return None
    return lcm(*multiples) * manifest.upscale


def largest_side(manifest: Manifest) -> int | None:
    """Return the most pixels of a side that the network has places for; None for any number."""
    config = manifest.config
    if not isinstance(config, PipelineConfig) or config.largest_side is None:
        return None
    return config.largest_side * manifest.upscale


def as_a_whole(
    size: str, manifest: Manifest, workers: Sequence[WorkerState], *, max_area: float
) -> OutputSize:
    """Return `size` denoised in one piece, with at most `max_area` times the pixels of the model's own.

    Raises:
        ValueError: the workers cannot make it; the message is one sentence for the caller.
    """
    largest = largest_side(manifest)
    if largest is not None and max(_sides(size)) > largest:
        raise ValueError(f"The sides of a picture of this model are at most {largest}.")
    step = size_step(manifest, workers)
    if step is None:
        raise ValueError(f"This model makes {size_text(manifest)} images only, or larger ones with windows.")
    latent = _latent(size, manifest, step=step, max_area=max_area)
    return OutputSize(latent, row_cost=prod(latent) / prod(manifest.config.image_size))


def in_windows(size: str, manifest: Manifest, *, max_area: float) -> OutputSize:
    """Return `size` denoised in windows of the model's own size, with at most `max_area` times its pixels.

    Raises:
        ValueError: it is not larger, or cannot be decoded; the message is one sentence for the caller.
    """
    own, sides = size_text(manifest), _sides(size)
    if sides == _sides(own) or any(side < least for side, least in zip(sides, _sides(own), strict=True)):
        raise ValueError(f"Windows are for sizes larger than the model's own, {own}.")
    latent = _latent(size, manifest, step=manifest.upscale, max_area=max_area)
    windows = window_count(latent, manifest.config.image_size)
    return OutputSize(latent, windows, float(windows))


def _latent(size: str, manifest: Manifest, *, step: int, max_area: float) -> Size:
    width, height = _sides(size)
    if not width or not height or width % step or height % step:
        raise ValueError(f"Width and height must be multiples of {step}.")
    factor = manifest.upscale
    latent = height // factor, width // factor
    if prod(latent) > max_area * prod(manifest.config.image_size):
        pixels = int(max_area * prod(manifest.config.image_size)) * factor**2
        raise ValueError(f"At most {pixels} pixels in all.")
    return latent


def _sides(size: str) -> tuple[int, int]:
    """Return width and height of "128x64"."""
    width, height = size.split("x")
    return int(width), int(height)
