"""Image files: encoded pictures on disk that are decoded on request."""

from __future__ import annotations

import os
import struct
import zlib
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
from PIL.PngImagePlugin import PngImageFile

from ditserve.model.data.examples import DataError

Image.init()
# The only decoders that are tried, whatever format a file claims to have, if Pillow was built with them.
FORMATS = tuple(
    kind
    for kind in ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
    if kind in Image.OPEN
)
# A .mpo is a JPEG with further pictures behind it.
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
# Exif: the orientation tag, and its values that exchange width and height.
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The keywords of a PNG's text chunks that may tell an orientation.
EXIF_KEYS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")
LONGEST_KEY = 32
CHECKSUM = 4  # bytes after the content of a PNG's chunk
PIECE = 1 << 14  # bytes of a large file that are read for its checksum
CHUNK = 64  # pictures that a thread examines at a time

Check = Literal["decode", "header"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageFiles:
    """N pictures that are files, or byte ranges of files.

    `spans` int64 (N, 3) holds for each picture an index into `files`, its first byte and its length; length
    −1 means the whole file. `names` (N,) are used in messages.
    """

    files: tuple[Path, ...]
    spans: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        """Decode a picture: upright, uint8 (H, W, 3), transparent parts on white.

        Raises:
            DataError: the file is missing, damaged, or larger than Pillow allows (decompression bombs).
        """
        with self._open(index) as image:
            return _upright(image)

    def size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of a picture, read from the file's header alone.

        Raises:
            DataError: as `__getitem__`, as far as the header shows it.
        """
        with self._open(index) as image:
            # Pillow turns a TIFF's size itself.
            sideways = image.format != "TIFF" and _orientation(image) in SIDEWAYS
            return (image.width, image.height) if sideways else (image.height, image.width)

    def checksum(self, index: int) -> int:
        """Return 32 bits that change with the bytes of a picture.

        Of a file above 64 KiB its length, its beginning, middle and end are read.

        Raises:
            DataError: the file is missing.
        """
        file, first, length = (int(value) for value in self.spans[index])
        try:
            with self.files[file].open("rb") as raw:
                length = os.fstat(raw.fileno()).st_size if length < 0 else length
                starts = (0,) if length <= 4 * PIECE else (0, length // 2, length - PIECE)
                bits = zlib.crc32(str(length).encode())
                for start in starts:
                    raw.seek(first + start)
                    bits = zlib.crc32(raw.read(length if len(starts) == 1 else PIECE), bits)
                return bits
        except OSError as error:
            raise DataError(f"{self.names[index]}: {error.strerror}") from None

    def take(self, index: npt.NDArray[np.int64]) -> ImageFiles:
        """Return the pictures at `index` (n,)."""
        return replace(self, spans=self.spans[index], names=tuple(self.names[k] for k in index))

    @contextmanager
    def _open(self, index: int) -> Iterator[Image.Image]:
        file, first, length = (int(value) for value in self.spans[index])
        try:
            with self.files[file].open("rb") as raw:
                stream = raw if length < 0 else ContainerIO.ContainerIO(raw, first, length)
                with Image.open(stream, formats=FORMATS) as image:
                    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
                        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels")
                    yield image
        except UnidentifiedImageError:
            raise DataError(f"{self.names[index]}: it is not a picture in a known format") from None
        # Decoders raise exceptions of any class on damaged data.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.names[index]}: {reason}") from None


def _orientation(image: Image.Image) -> int | None:
    """Return the Exif orientation; the picture is decoded only if it must be."""
    early = not isinstance(image, PngImageFile) or _tells_late(image)
    # A PNG's own `getexif` decodes the picture first.
    return (image.getexif() if early else Image.Image.getexif(image)).get(ORIENTATION)


def _tells_late(image: PngImageFile) -> bool:
    """Return True if a PNG holds Exif data behind its pixels, by going from chunk to chunk (PNG, §5.3)."""
    stream = image.fp
    assert stream is not None
    place = stream.tell()
    stream.seek(len(PNG_SIGNATURE))
    passed_pixels = found = False
    while not found and len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        content = stream.read(min(length, LONGEST_KEY)) if passed_pixels else b""
        found = passed_pixels and (kind == b"eXIf" or content.startswith(EXIF_KEYS))
        passed_pixels |= kind == b"IDAT"
        stream.seek(length - len(content) + CHECKSUM, os.SEEK_CUR)
    stream.seek(place)
    return found


def _upright(image: Image.Image) -> npt.NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode} are not 8 bits a channel")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    return np.asarray(image.convert("RGB"))


@dataclass(frozen=True, slots=True, eq=False)
class Examination:
    """The outcome of opening every picture.

    `readable` int64 holds the indices of the pictures that can be used, `sizes` counts their (H, W), and
    `broken` has one message for each of the others.
    """

    readable: npt.NDArray[np.int64]
    sizes: Counter[tuple[int, int]]
    broken: tuple[str, ...]


def examine(images: ImageFiles, check: Check) -> Examination:
    """Open every picture, on all processors: decode it whole, or read only its header."""

    def size(index: int) -> tuple[int, int] | str:
        try:
            if check == "header":
                return images.size(index)
            height, width, _ = images[index].shape
            return height, width
        except DataError as error:
            return str(error)

    def chunk_sizes(start: int) -> list[tuple[int, int] | str]:
        return [size(index) for index in range(start, min(start + CHUNK, len(images)))]

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        chunks = threads.map(chunk_sizes, range(0, len(images), CHUNK))
        sizes = [size_or_message for chunk in chunks for size_or_message in chunk]
    return Examination(
        np.array([k for k, size in enumerate(sizes) if not isinstance(size, str)], np.int64),
        Counter(size for size in sizes if not isinstance(size, str)),
        tuple(size for size in sizes if isinstance(size, str)),
    )
