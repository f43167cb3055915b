"""Image files: encoded pictures on disk that are decoded on request, and folders of them.

In a folder the class of a picture is the name of its sub-folder.
"""

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
from ditserve.model.data.labels import Catalogue

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# The only decoders that are tried, whatever format a file claims to have.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Exif: the orientation tag, and its values that exchange width and height.
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
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
            sideways = image.format == "JPEG" and image.getexif().get(ORIENTATION) in SIDEWAYS
            return (image.width, image.height) if sideways else (image.height, image.width)

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


def read_folder(path: Path, *, captions: bool) -> tuple[ImageFiles, Catalogue]:
    """Read the pictures below `path` in the order of torchvision's ImageFolder: by class, then by path.

    If every class has the same sub-folders and no picture beside them, these sub-folders are the styles. A
    folder without sub-folders has no classes. With `captions`, a picture's caption is the text file beside it
    (`fox.txt` for `fox.png`), or empty.

    Raises:
        DataError: there are no pictures, or a caption is not UTF-8.
    """
    names = _subfolders(path)
    styles = _styles(path, names)
    files: list[Path] = []
    y: list[int] = []
    s: list[int] = []
    folders = [
        (k, m, path / name / style) for k, name in enumerate(names) for m, style in enumerate(styles or [""])
    ]
    for k, m, folder in folders or [(0, 0, path)]:
        pictures = list(_pictures(folder))
        files += pictures
        y += [k] * len(pictures)
        s += [m] * len(pictures)
    if not files:
        raise DataError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    spans = np.stack([np.arange(len(files)), np.zeros(len(files), int), np.full(len(files), -1)], axis=1)
    images = ImageFiles(tuple(files), spans, tuple(str(file) for file in files))
    texts = tuple(_caption(file) for file in files) if captions else ()
    return images, Catalogue(np.array(y), tuple(names), np.array(s), tuple(styles), captions=texts)


def _subfolders(path: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")
    )


def _styles(path: Path, names: list[str]) -> list[str]:
    inner = [_subfolders(path / name) for name in names]
    loose = any(file.suffix.lower() in SUFFIXES for name in names for file in (path / name).iterdir())
    return inner[0] if inner and inner.count(inner[0]) == len(inner) and not loose else []


def _pictures(path: Path) -> Iterator[Path]:
    for root, _, files in sorted(os.walk(path)):
        for file in sorted(files):
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith("."):
                yield Path(root, file)


def _caption(file: Path) -> str:
    text_file = file.with_suffix(".txt")
    try:
        return text_file.read_text("utf-8").strip() if text_file.is_file() else ""
    except UnicodeDecodeError:
        raise DataError(f"{text_file} is not UTF-8 text") from None
