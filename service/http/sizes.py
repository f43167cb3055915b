"""Sizes: what a request writes ("128x64", and frames), and the latents that workers denoise for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.sizes import Size, scaled
from ditserve.model.spec.windows import window_count
from ditserve.service.fleet import WorkerState
from ditserve.service.formats import kind_of


@dataclass(frozen=True, slots=True)
class OutputSize:
    """The size of a request's images.

    `size` is in latent pixels along every axis, None for the model's own. `windows` is the number of windows
    in which an image is denoised, 0 if it is denoised as a whole. `row_cost` is the tokens of predicting it
    once, in rows of the model's own size.
    """

    size: Size | None = None
    windows: int = 0
    row_cost: float = 1.0


@dataclass(frozen=True, slots=True)
class AskedSize:
    """The size as a request says it: "128x64", and the frames of a clip; None is the model's own."""

    size: str | None = None
    frames: int | None = None

    def is_own(self, manifest: Manifest) -> bool:
        return self.size in (None, size_text(manifest)) and self.frames in (None, frame_count(manifest))


class UnusableSize(ValueError):
    """A size that cannot be made. The message is one sentence on the `field` of the request."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field


def size_text(manifest: Manifest, size: Size | None = None) -> str:
    """Return width x height in pixels of images of a latent size; None is the model's own."""
    height, width = picture_size(manifest, size)
    return f"{width}x{height}"


def picture_size(manifest: Manifest, size: Size | None = None) -> Size:
    """Return height and width in pixels of images of a latent size; None is the model's own."""
    return scaled(size or manifest.config.image_size, manifest.upscale)[-2:]


def frame_count(manifest: Manifest, size: Size | None = None) -> int | None:
    """Return the frames of a clip, or the depth of a volume, of a latent size; None of a picture."""
    sides = size or manifest.config.image_size
    return sides[0] if len(sides) == 3 else None


def size_steps(manifest: Manifest, workers: Sequence[WorkerState]) -> Size | None:
    """Return what every side in pixels must be a multiple of, so that every worker can make the size.

    Frames come first where there are any. Return None if there is no worker, or one of them makes a single
    size only.
    """
    networks = [worker.network for worker in workers]
    multiples = [network.size_multiple for network in networks if network.size_multiple is not None]
    if len(multiples) < len(workers) or not workers:
        return None
    side = lcm(*multiples) * manifest.upscale
    first = lcm(*(network.first_multiple for network in networks))
    return (*(first,) * (len(manifest.config.image_size) - 2), side, side)


def largest_side(manifest: Manifest) -> int | None:
    """Return the most pixels of a side that the network has places for; None for any number."""
    config = manifest.config
    if not isinstance(config, PipelineConfig) or config.largest_side is None:
        return None
    return config.largest_side * manifest.upscale


def as_a_whole(
    asked: AskedSize, manifest: Manifest, workers: Sequence[WorkerState], *, max_area: float
) -> OutputSize:
    """Return a size denoised in one piece, with at most `max_area` times the pixels of the model's own.

    Raises:
        UnusableSize: the workers cannot make it.
    """
    largest = largest_side(manifest)
    if largest is not None and max(_sides(asked, manifest)) > largest:
        raise UnusableSize("size", f"The sides of a picture of this model are at most {largest}.")
    steps = size_steps(manifest, workers)
    if steps is None:
        raise _other_than_own(asked, manifest)
    latent = _latent(asked, manifest, steps=steps, max_area=max_area)
    return OutputSize(latent, row_cost=prod(latent) / prod(manifest.config.image_size))


def in_windows(asked: AskedSize, manifest: Manifest, *, max_area: float) -> OutputSize:
    """Return a size denoised in windows of the model's own size, with at most `max_area` times its pixels.

    Raises:
        UnusableSize: it is not larger, or cannot be decoded.
    """
    own, sides, least = manifest.config.image_size, _sides(asked, manifest), _sides(AskedSize(), manifest)
    if sides == least or any(side < bound for side, bound in zip(sides, least, strict=True)):
        field = "size" if asked.frames is None or asked.size not in (None, size_text(manifest)) else "frames"
        raise UnusableSize(field, f"Windows are for sizes larger than the model's own, {own_text(manifest)}.")
    steps = scaled((1,) * len(own), manifest.upscale)
    latent = _latent(asked, manifest, steps=steps, max_area=max_area)
    windows = window_count(latent, own)
    return OutputSize(latent, windows, float(windows))


def own_text(manifest: Manifest) -> str:
    """Return the model's own size in words, such as "48x48 of 8 frames"."""
    frames = frame_count(manifest)
    unit = "frames" if kind_of(manifest) == "clip" else "slices"
    return size_text(manifest) if frames is None else f"{size_text(manifest)} of {frames} {unit}"


def _other_than_own(asked: AskedSize, manifest: Manifest) -> UnusableSize:
    """Return the error of another size where workers make a single one."""
    own, frames = size_text(manifest), frame_count(manifest)
    if asked.size in (None, own):
        return UnusableSize("frames", f"This model makes {frames} frames only, or more with windows.")
    return UnusableSize("size", f"This model makes {own} images only, or larger ones with windows.")


def _latent(asked: AskedSize, manifest: Manifest, *, steps: Size, max_area: float) -> Size:
    sides, factor, own = _sides(asked, manifest), manifest.upscale, manifest.config.image_size
    *front, height, width = sides
    if not width or not height or width % steps[-1] or height % steps[-2]:
        raise UnusableSize("size", f"Width and height must be multiples of {steps[-1]}.")
    if front and front[0] % steps[0]:
        raise UnusableSize("frames", f"Their number must be a multiple of {steps[0]}.")
    latent = (*front, height // factor, width // factor)
    if prod(latent) > max_area * prod(own):
        most = int(max_area * prod(own)) // prod(latent[-2:])
        if front and most:
            raise UnusableSize("frames", f"At most {most} frames of {size_text(manifest, latent)} pixels.")
        pixels = int(max_area * prod(own[-2:])) * factor**2
        raise UnusableSize("size", f"At most {pixels} pixels in all.")
    return latent


def _sides(asked: AskedSize, manifest: Manifest) -> Size:
    """Return the sides that are asked for, height and width in pixels last."""
    frames = asked.frames or frame_count(manifest)
    width, height = map(int, (asked.size or size_text(manifest)).split("x"))
    return (height, width) if frames is None else (frames, height, width)
