"""Encoded pictures on disk, decoded when they are asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ContainerIO, Image, ImageOps, UnidentifiedImageError

from ditserve.model.data.examples import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # no others are tried, whatever a file says it is
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # Exif: the tag, and its values that exchange width and height
PIECE = 64  # pictures that a thread examines at a time

Check = Literal["decode", "header"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageFiles:
    """Pictures that are files, or stretches of files.

    `spans` int64 (N, 3) holds a number in `files`, the first byte and the length; −1 is the whole file. `names` (N,) are for messages.
    """

    files: tuple[Path, ...]
    spans: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        """Decoded, upright, uint8 (H, W, 3); what is transparent shows white.

        Raises:
            DataError: the file is missing or damaged, or larger than Pillow's limit against decompression bombs.
        """
        with self._opened(index) as image:
            return _upright(image)

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) by the file's header alone.

        Raises:
            DataError: as above, for what a header tells.
        """
        with self._opened(index) as image:
            sideways = image.format == "JPEG" and image.getexif().get(ORIENTATION) in SIDEWAYS
            return (image.width, image.height) if sideways else (image.height, image.width)

    def take(self, index: npt.NDArray[np.int64]) -> ImageFiles:
        """Some of the pictures."""
        return replace(self, spans=self.spans[index], names=tuple(self.names[k] for k in index))

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        number, first, length = (int(part) for part in self.spans[index])
        try:
            with self.files[number].open("rb") as raw:
                stream = raw if length < 0 else ContainerIO.ContainerIO(raw, first, length)
                with Image.open(stream, formats=FORMATS) as image:
                    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
                        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels")
                    yield image
        except UnidentifiedImageError:
            raise DataError(f"{self.names[index]}: it is not a picture in a known format") from None
        except Exception as error:  # decoders raise whatever they like on damaged data
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.names[index]}: {reason}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """`readable` int64 are the pictures that can be used, `sizes` counts their (H, W), `broken` says what ails the others."""

    readable: npt.NDArray[np.int64]
    sizes: Counter[tuple[int, int]]
    broken: tuple[str, ...]


def examine(images: ImageFiles, check: Check) -> Examined:
    """Open every picture, on all processors: decode it whole, or read its header only."""

    def size(index: int) -> tuple[int, int] | str:
        try:
            if check == "header":
                return images.size(index)
            height, width, _ = images[index].shape
            return height, width
        except DataError as error:
            return str(error)

    def sizes(start: int) -> list[tuple[int, int] | str]:
        return [size(k) for k in range(start, min(start + PIECE, len(images)))]

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = [each for piece in threads.map(sizes, range(0, len(images), PIECE)) for each in piece]
    return Examined(
        np.array([k for k, each in enumerate(found) if not isinstance(each, str)], np.int64),
        Counter(each for each in found if not isinstance(each, str)),
        tuple(each for each in found if isinstance(each, str)),
    )


def _upright(image: Image.Image) -> npt.NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode} are not 8 bits a channel")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return np.asarray(image.convert("RGB"))
