"""From model output to image files with metadata that says how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin

_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "png": {"compress_level": 6},
    "webp": {"quality": 90, "method": 4},
    "jpeg": {"quality": 92, "subsampling": 0},
}
_ASCII: Final = b"ASCII\0\0\0"  # the character code that begins an EXIF UserComment (Exif 2.32, §4.6.5)


def to_pixels(images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return RGB pixels (B, H, W, 3) of model output (B, 1 or 3, H, W), which is clamped to [-1, 1].

    Clips and volumes have one axis more before the height.
    """
    scaled = np.clip(np.rint(127.5 * images + 127.5), 0.0, 255.0).astype(np.uint8)
    pixels = np.ascontiguousarray(np.moveaxis(scaled, 1, -1))
    return pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, axis=-1)


def from_pixels(pixels: npt.NDArray[np.uint8], channels: int = 3) -> npt.NDArray[np.float32]:
    """Return RGB pixels (B, H, W, 3) as a model makes them, (B, `channels`, H, W) in [-1, 1].

    It is the inverse of `to_pixels`. A model of one channel sees their luma (ITU-R BT.601).
    """
    scaled = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    if channels == 1:
        scaled = scaled @ np.array([[0.299], [0.587], [0.114]], np.float32)
    return np.ascontiguousarray(np.moveaxis(scaled, -1, 1))


def encode(pixels: npt.NDArray[np.uint8], format: str, *, metadata: Mapping[str, str]) -> bytes:
    """Return pixels (H, W, 3) as a "png", "webp" or "jpeg" file that carries `metadata`.

    In PNG each entry is a text chunk of its name. In the others all entries are one JSON object, in the EXIF
    UserComment or the comment of a GIF.

    Raises:
        ValueError: another format.
    """
    if format not in _OPTIONS:
        raise ValueError(f"unknown image format {format!r}: choose among {', '.join(_OPTIONS)}")
    out = BytesIO()
    Image.fromarray(pixels).save(out, format=format, **_OPTIONS[format], **metadata_options(format, metadata))
    return out.getvalue()


def metadata_options(format: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the options with which Pillow writes the metadata into a file of this format."""
    if not metadata:
        return {}
    if format in ("png", "apng"):
        chunks = PngImagePlugin.PngInfo()
        for name, value in metadata.items():
            chunks.add_itxt(name, value)
        return {"pnginfo": chunks}
    if format == "gif":
        return {"comment": comment(metadata).encode("ascii")}
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + comment(metadata).encode("ascii")
    return {"exif": exif}


def comment(metadata: Mapping[str, str]) -> str:
    """Return metadata as the one text that formats without named texts hold: JSON, in ASCII."""
    return json.dumps(dict(metadata))
