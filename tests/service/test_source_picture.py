"""A picture that a request starts from travels without loss, and nothing else is taken for one."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ditserve.service.source_picture import Pixels, SourcePicture, decode, encode

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_pixels_travel_without_loss(shape: tuple[int, ...]) -> None:
    pixels: Pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode(pixels)), pixels)


def test_other_bytes_are_refused() -> None:
    jpeg, paletted, transparent = BytesIO(), BytesIO(), BytesIO()
    Image.new("RGB", (2, 2)).save(jpeg, "jpeg")
    Image.new("1", (2, 2)).save(paletted, "png")
    Image.new("RGBA", (2, 2)).save(transparent, "png")
    for data in (b"", b"\x89PNG", jpeg.getvalue(), paletted.getvalue(), transparent.getvalue()):
        with pytest.raises(ValueError, match="not a picture of a request"):
            decode(data)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_a_strength_that_walks_nothing_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        SourcePicture(b"", None, strength)
