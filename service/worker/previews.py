"""Previews without the autoencoder: a linear projection of latents to colours, fitted to what it decodes.

A large autoencoder takes as long for a preview as for a picture. The projection of a latent of 16 channels
is 17 × 3 numbers a pixel.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from ditserve.model.spec.manifest import DecoderKind
from ditserve.service.worker.postprocess import Decoder

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

# Kinds of decoders that cost too much for every preview.
LARGE_DECODERS: Final[tuple[DecoderKind, ...]] = ("sd-vae", "pipeline")
FITTED_SIDE: Final = 16  # of the latents that the projection is fitted to
FITTED_LATENTS: Final = 4


class PreviewDecoder:
    """A decoder that maps each pixel of a latent to one colour, and enlarges that to the picture's size.

    The colours are those of least squares, with an intercept, to what `decoder` makes of `fitted_latents`. It
    is asked once, at the first preview.

    Args:
        factor: the pixels that a latent covers on a side.
    """

    def __init__(self, decoder: Decoder, *, channels: int, factor: int) -> None:
        self._decoder, self._channels, self._factor = decoder, channels, factor

    def decode(self, latents: Floats) -> Pixels:
        """Return approximate pixels (B, H, W, 3) of latents (B, C, h, w), and of clips likewise."""
        colours = np.clip(np.rint(_with_intercept(latents) @ self._projection), 0, 255).astype(np.uint8)
        *rows, height, width, _ = colours.shape
        size = width * self._factor, height * self._factor
        frames = colours.reshape(-1, height, width, 3)
        pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR) for frame in frames]
        return np.stack([np.asarray(picture) for picture in pictures]).reshape(*rows, *size[::-1], 3)

    @cached_property
    def _projection(self) -> Floats:
        latents = fitted_latents(self._channels)
        colours = mean_colours(self._decoder.decode(latents), self._factor)
        given = _with_intercept(latents).reshape(-1, self._channels + 1)
        solution, *_ = np.linalg.lstsq(given, colours.reshape(-1, 3), rcond=None)
        projection: Floats = solution.astype(np.float32)
        return projection


def fitted_latents(channels: int, seed: int = 0) -> Floats:
    """Return latents (`FITTED_LATENTS`, C, h, w) of areas of all sizes, with a variance of 1.

    They are the sum of noise in squares of 1, 2, 4, 8 and 16 pixels, the same for the same seed.
    """
    random = np.random.Generator(np.random.Philox(seed))
    squares = [1 << k for k in range(FITTED_SIDE.bit_length())]
    total = np.zeros((FITTED_LATENTS, channels, FITTED_SIDE, FITTED_SIDE), np.float32)
    for square in squares:
        side = FITTED_SIDE // square
        noise = random.standard_normal((FITTED_LATENTS, channels, side, side), np.float32)
        total += noise.repeat(square, axis=2).repeat(square, axis=3)
    return total / np.float32(len(squares) ** 0.5)


def mean_colours(pixels: Pixels, factor: int) -> Floats:
    """Return the mean colours (B, h, w, 3) of the squares of pixels (B, H, W, 3) that a latent covers."""
    count, height, width, _ = pixels.shape
    squares = pixels.reshape(count, height // factor, factor, width // factor, factor, 3)
    means: Floats = squares.mean(axis=(2, 4), dtype=np.float32)
    return means


def _with_intercept(latents: Floats) -> Floats:
    """Return the channels (B, …, h, w, C + 1) of the pixels of latents (B, C, …, h, w), and 1."""
    channels = np.moveaxis(latents, 1, -1)
    ones = np.ones((*channels.shape[:-1], 1), np.float32)
    return np.concatenate([channels, ones], axis=-1)
