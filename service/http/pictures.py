"""Pictures that clients send: opened with suspicion, turned upright, and cut to the size that is drawn.

Nobody vouches for these files, so each bound is checked before what it bounds is spent:

| bound | checked |
|---|---|
| PNG, JPEG or WebP, by their first bytes | before a decoder is chosen |
| one picture a file, of at most `MAX_PIXELS` | in the head of the file, before its pixels are decoded |
| at most `MAX_SCANS` of a JPEG, each a walk over all its pixels | by its markers, before it is decoded |

A JPEG far larger than the size that is drawn is decoded at a half, a quarter or an eighth of its size.

The part of a picture that is used is the largest in its middle that has the shape of the picture to be drawn:
nothing is stretched. A mask has the shape of its picture, and is cut alike.
"""

from __future__ import annotations

import re
import warnings
from binascii import Error, a2b_base64
from io import BytesIO
from math import ceil, prod
from typing import Final

import numpy as np
from PIL import ExifTags, Image

from ditserve.model.spec.sizes import Size
from ditserve.service.source_picture import Pixels

FORMATS: Final = ("PNG", "JPEG", "WEBP")
MAX_PIXELS: Final = 2**24
# A progressive JPEG has about ten. One of 8 MB can have a hundred thousand, and would take hours.
MAX_SCANS: Final = 100
_SCAN: Final = b"\xff\xda"
_TOO_LARGE: Final = f"It has more than {MAX_PIXELS} pixels: make it smaller."
_DATA_URL = re.compile(r"data:[a-z0-9.+/-]{0,60};base64,", re.IGNORECASE)
# The value of the EXIF orientation → the turn that makes the picture upright (Exif 2.32, §4.6.4).
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE: Final = frozenset({5, 6, 7, 8})
# A picture is decoded at no less than so many times the size that is drawn, so that scaling it loses nothing.
_MARGIN: Final = 2
# Pillow warns of oddities in the words of the file, and of too many pixels before they can be counted here.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.simplefilter("error", Image.DecompressionBombWarning)


class UnusablePicture(ValueError):
    """A file that is no picture, or not one that is taken; the message is one sentence about it."""


def data_url_bytes(url: str) -> bytes:
    """Return the bytes in a data URL in base64. Raises `ValueError` for any other text."""
    head = _DATA_URL.match(url)
    if head is None:
        raise ValueError(
            "Send the picture itself as a data URL, data:image/png;base64,…: nothing is fetched."
        )
    try:
        return a2b_base64(url[head.end() :], strict_mode=True)
    except (Error, ValueError):
        raise ValueError("The data URL is not in base64.") from None


def read_picture(data: bytes, size: Size) -> Pixels:
    """Return RGB pixels (H, W, 3) of a file, `size` being H and W. What is transparent becomes white.

    Raises:
        UnusablePicture: the file is no picture, or beyond a bound.
    """
    return _rgb(_opened(data, size))


def read_mask(data: bytes, size: Size, *, picture: bytes) -> Pixels:
    """Return the levels (H, W) of a mask: 255 is repainted and 0 is kept.

    What is transparent in the file is repainted; in a file without transparency, what is white.

    Raises:
        UnusablePicture: as `read_picture`, or its shape is not that of the `picture` that it is for.
    """
    own, other = _sides(data), _sides(picture)
    if not _same_shape(own, other):
        written, expected = ("x".join(map(str, sides)) for sides in (own, other))
        raise UnusablePicture(f"The mask is {written} and its picture {expected}: give both the same shape.")
    levels = _mask_levels(_opened(data, size))
    if not levels.any():
        raise UnusablePicture("It repaints nothing: make a part of it transparent, or white.")
    return levels


def _sides(data: bytes) -> tuple[int, int]:
    """Return width and height of an upright picture, of which only the head is read."""
    picture = _with_head(data)
    width, height = picture.size
    return (height, width) if _orientation(picture) in _ON_ITS_SIDE else (width, height)


def _same_shape(own: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return True if one is the other in another scale, to less than a pixel of the smaller.

    Example: 100x66 and 100x67 are 300x200 in another scale, 100x68 is not.
    """
    (least, small), (most, large) = sorted(((own[0], own[1]), (other[0], other[1])))
    return abs(small * most - large * least) < max(most, large)


def _with_head(data: bytes) -> Image.Image:
    """Return a picture of which the head was read, and found within the bounds."""
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
        frames = getattr(picture, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnusablePicture(_TOO_LARGE) from None
    # A decoder raises whatever a damaged file leads it to.
    except Exception:
        raise UnusablePicture("It is no picture in PNG, JPEG or WebP.") from None
    if prod(picture.size) > MAX_PIXELS:
        raise UnusablePicture(_TOO_LARGE)
    if not prod(picture.size):
        raise UnusablePicture("It has no pixels.")
    # The further pictures of a camera's JPEG (MPO) are the first one in other sizes.
    if frames > 1 and picture.format != "MPO":
        raise UnusablePicture("It is animated: send a picture that stands still.")
    if picture.format in ("JPEG", "MPO") and data.count(_SCAN) > MAX_SCANS:
        raise UnusablePicture(f"It has more than {MAX_SCANS} scans: save it as a plain JPEG.")
    return picture


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation of a picture, 1 where there is none that can be read."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _opened(data: bytes, size: Size) -> Image.Image:
    """Return the middle of a picture, upright, in `size`: its modes are L, RGB and RGBA."""
    picture = _with_head(data)
    turn = _TURNS.get(orientation := _orientation(picture))
    # In the file it lies as it was taken, so it is cut before it is turned.
    height, width = reversed(size) if orientation in _ON_ITS_SIDE else size
    scale = max(width / picture.width, height / picture.height)
    try:
        least_width, least_height = (ceil(_MARGIN * scale * side) for side in picture.size)
        picture.draft(picture.mode, (least_width, least_height))
        cut = _middle(_eight_bits(picture), width, height)
    except Exception:
        raise UnusablePicture("It is damaged or cut off: its pixels cannot be decoded.") from None
    return cut.transpose(turn) if turn is not None else cut


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Return the largest part in the middle that has the shape of `width` by `height`, in that size."""
    if picture.size == (width, height):
        return picture
    if picture.mode == "RGBA":
        # The colour of what is transparent must not shine into its neighbours.
        picture = picture.convert("RGBa")
    scale = max(width / picture.width, height / picture.height)
    left = max(0.0, (picture.width - width / scale) / 2)
    top = max(0.0, (picture.height - height / scale) / 2)
    box = (left, top, picture.width - left, picture.height - top)
    # A far larger one is first averaged to about twice the size, which takes a tenth of the time.
    cut = picture.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=_MARGIN)
    return cut.convert("RGBA") if cut.mode == "RGBa" else cut


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Return a picture, which is decoded here, as L, RGB or RGBA."""
    picture.load()
    if picture.mode.startswith("I"):
        # 16 bits of grey, which Pillow would cut off at 255.
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    mode = "RGBA" if picture.has_transparency_data else "L" if picture.mode in ("1", "L") else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _rgb(picture: Image.Image) -> Pixels:
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))


def _mask_levels(mask: Image.Image) -> Pixels:
    if mask.mode == "RGBA":
        kept = np.array(mask.getchannel("A"))
        if kept.min() < 255:
            return 255 - kept
    return np.array(mask.convert("L"))
