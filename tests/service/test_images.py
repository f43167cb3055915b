"""Image files: what goes in comes out, and the file says how it was made."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image

from ditserve.service.formats import CONTENT_TYPES, MediaFormat
from ditserve.service.images import encode, from_pixels, to_pixels

METADATA = {"seed": "7", "condition": "Erdbeere 🍓", "sampler": "ddim"}


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    """Return a smooth picture, which lossy formats keep well."""
    y, x = np.mgrid[0:48, 0:40]
    return np.stack([4 * y, 5 * x, 2 * (x + y)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("format", "tolerance"), [("png", 0), ("webp", 12), ("jpeg", 12)])
def test_a_file_shows_the_picture(pixels: npt.NDArray[np.uint8], format: MediaFormat, tolerance: int) -> None:
    data = encode(pixels, format, metadata=METADATA)
    with Image.open(BytesIO(data)) as image:
        assert Image.MIME[image.format or ""] == CONTENT_TYPES[format]
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown - pixels).max() <= tolerance


def test_png_carries_its_parameters_as_text(pixels: npt.NDArray[np.uint8]) -> None:
    with Image.open(BytesIO(encode(pixels, "png", metadata=METADATA))) as image:
        image.load()
        assert image.info == METADATA


def test_pixels_become_what_a_model_makes_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    for channels in (3, 1):
        made = from_pixels(pixels, channels)
        assert made.shape == (1, channels, 16, 16)
        assert (made.min(), made.max()) == (-1.0, 1.0)
        np.testing.assert_array_equal(to_pixels(made), pixels)
    red = np.full((1, 1, 1, 3), (255, 0, 0), np.uint8)
    assert to_pixels(from_pixels(red, 1)).ravel().tolist() == [76] * 3


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_webp_and_jpeg_carry_them_as_a_comment(pixels: npt.NDArray[np.uint8], format: str) -> None:
    with Image.open(BytesIO(encode(pixels, format, metadata=METADATA))) as image:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"ASCII\0\0\0")
    assert json.loads(comment[8:]) == METADATA


def test_no_metadata_leaves_no_trace(pixels: npt.NDArray[np.uint8]) -> None:
    with Image.open(BytesIO(encode(pixels, "jpeg", metadata={}))) as image:
        assert not image.getexif()


def test_an_unknown_format_is_refused(pixels: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="unknown image format 'gif'"):
        encode(pixels, "gif", metadata={})


def test_the_model_range_maps_to_all_of_the_bytes() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32).reshape(1, 1, 1, 5)
    grey = to_pixels(values)
    assert grey.shape == (1, 1, 5, 3)
    assert grey[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    colours = to_pixels(np.stack([np.full((4, 5), v, np.float32) for v in (-1.0, 0.0, 1.0)])[None])
    assert colours[0, 2, 3].tolist() == [0, 128, 255]
