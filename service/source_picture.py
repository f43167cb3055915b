"""The picture that a request starts from, as the API hands it to the workers. Pure.

The API makes RGB pixels of the size that is to be made of whatever a client sends, and writes them as PNG.
Workers read nothing but what the API wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

REPAINTED: Final = 255  # in a mask; 0 is kept


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """A picture to start from, the part of it to repaint, and the share 0..1 of the steps that are walked.

    `image` is the PNG of pixels (H, W, 3) and `mask` that of pixels (H, W): 255 is repainted and 0 is kept.
    Without a mask all of it is repainted.
    """

    image: bytes
    mask: bytes | None
    strength: float

    def __post_init__(self) -> None:
        if not 0.0 < self.strength <= 1.0:
            raise ValueError(f"its strength is {self.strength}, not above 0 and at most 1")


def encode(pixels: Pixels) -> bytes:
    """Return pixels (H, W, 3) or (H, W) as PNG."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, format="png", compress_level=1)
    return out.getvalue()


def decode(data: bytes) -> Pixels:
    """Return the pixels (H, W, 3) or (H, W) that `encode` was given. Raises `ValueError` for others."""
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            pixels = np.array(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a picture of a request: {error}") from None
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(f"not a picture of a request: its pixels are {pixels.dtype} {pixels.shape}")
    return pixels
