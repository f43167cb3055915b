"""Volumes as files: the numbers themselves (`.npz`), or a clip of the volume, turning once about its height.

A volume is pixels (D, H, W, 3): depth, height and width. What is dark is clear, and what is bright is dense
and of its own colour. A view is the light that reaches the eye through it, front to back (Max 1995, Optical
Models for Direct Volume Rendering, with absorption and emission in proportion).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Final

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

VIEWS: Final = 24
# The share of light that passes one voxel of the brightest.
_CLEARNESS: Final = 0.4
_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601


def encode_volume(volume: Pixels, *, metadata: Mapping[str, str]) -> bytes:
    """Return a volume as a file of `numpy.load`, with `volume` (D, H, W, 3) and `metadata` in JSON."""
    out = BytesIO()
    np.savez_compressed(out, volume=volume, metadata=np.array(json.dumps(dict(metadata))))
    return out.getvalue()


def turntable(volume: Pixels, views: int = VIEWS) -> Pixels:
    """Return views (`views`, H, W, 3) of a volume that turns once, the first from its front."""
    return np.stack([view(volume, 2 * np.pi * k / views) for k in range(views)])


def view(volume: Pixels, angle: float) -> Pixels:
    """Return the view (H, W, 3) of a volume turned by `angle` about its height, on black."""
    depth, _, width, _ = volume.shape
    reach = int(np.ceil(np.hypot(depth, width)))
    # The planes of voxels that the eye looks through, the nearest first, as places in the volume.
    ahead, across = np.mgrid[0:reach, 0:width].astype(np.float64)
    ahead -= (reach - 1) / 2
    across -= (width - 1) / 2
    cosine, sine = np.cos(angle), np.sin(angle)
    z = np.rint(cosine * ahead - sine * across + (depth - 1) / 2).astype(np.intp)
    x = np.rint(sine * ahead + cosine * across + (width - 1) / 2).astype(np.intp)
    inside = (z >= 0) & (z < depth) & (x >= 0) & (x < width)
    turned = volume[z.clip(0, depth - 1), :, x.clip(0, width - 1)].astype(np.float32)  # (reach, W, H, 3)
    turned *= inside[..., None, None] / np.float32(255)
    clear = np.float32(_CLEARNESS) ** (turned @ np.array(_LUMA, np.float32))  # (reach, W, H)
    seen, passed = np.zeros(turned.shape[1:], np.float32), np.ones(clear.shape[1:], np.float32)
    for plane, passes in zip(turned, clear, strict=True):
        seen += (passed * (1 - passes))[..., None] * plane
        passed *= passes
    return np.rint(255 * seen).astype(np.uint8).transpose(1, 0, 2)
