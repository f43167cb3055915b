"""Pictures that clients send: decoded, and made to the size that is drawn. Pure."""

from __future__ import annotations

import re
from binascii import Error, a2b_base64
from dataclasses import dataclass
from io import BytesIO
from math import prod

import numpy as np
from PIL import Image

from ditserve.model.spec.windows import Size
from ditserve.service.source_picture import Pixels

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]+)?;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """The most pixels of a picture that is decoded."""

    pixels: int


def data_url_bytes(url: str) -> bytes:
    """Return the bytes in a data URL of an image in base64. Raises `ValueError` for any other text."""
    head = _DATA_URL.match(url)
    if head is None:
        raise ValueError("Send the picture itself, as a data URL: data:image/png;base64,…")
    try:
        return a2b_base64(url[head.end() :], strict_mode=True)
    except (Error, ValueError):
        raise ValueError("The data URL is not base64.") from None


def read_picture(data: bytes, size: Size, limits: PictureLimits) -> Pixels:
    """Return a picture as RGB pixels (H, W, 3), `size` being H and W.

    Raises:
        ValueError: it cannot be decoded, or is too large; the message is one sentence.
    """
    return np.asarray(_read(data, size, limits, "RGB"))


def read_mask(data: bytes, size: Size, limits: PictureLimits) -> Pixels:
    """Return a mask as pixels (H, W): 255 is repainted and 0 is kept. Raises as `read_picture`."""
    return np.asarray(_read(data, size, limits, "L"))


def _read(data: bytes, size: Size, limits: PictureLimits, mode: str) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as picture:
            if prod(picture.size) > limits.pixels:
                raise ValueError(f"A picture may have {limits.pixels} pixels.")
            height, width = size
            return picture.convert(mode).resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("It is no picture in PNG, JPEG or WebP.") from None
