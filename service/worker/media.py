"""Pixels as the file that a job asks for: a picture, a clip, or a volume."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ditserve.service.formats import MediaFormat, MediaKind, preview_format
from ditserve.service.images import encode
from ditserve.service.worker.clips import encode_clip
from ditserve.service.worker.volumes import encode_volume, turntable, view

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


def encode_media(
    pixels: Pixels, kind: MediaKind, format: MediaFormat, *, fps: float, metadata: Mapping[str, str]
) -> bytes:
    """Return pixels (H, W, 3) of a picture, or (F, H, W, 3) of a clip or a volume, as a file.

    Raises:
        InvalidRequest: the package for this format is not installed here.
        ValueError: it is none of the formats of this kind.
    """
    if kind == "picture":
        return encode(pixels, format, metadata=metadata)
    if kind == "volume" and format == "npz":
        return encode_volume(pixels, metadata=metadata)
    frames = turntable(pixels) if kind == "volume" else pixels
    return encode_clip(frames, format, fps=fps, metadata=metadata)


def shown_part(latent: Floats, kind: MediaKind) -> Floats:
    """Return the part of a latent that its preview shows: of a clip (C, F, H, W) the frame in its middle."""
    if kind != "clip":
        return latent
    middle = latent.shape[1] // 2
    return latent[:, middle : middle + 1]


def encode_preview(pixels: Pixels, kind: MediaKind, format: MediaFormat) -> bytes:
    """Return the file of a preview, a single picture: of a clip its first frame, of a volume its front."""
    if kind == "clip":
        pixels = pixels[0]
    elif kind == "volume":
        pixels = view(pixels, 0.0)
    return encode(pixels, preview_format(format), metadata={})
