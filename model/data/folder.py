"""A folder of pictures: the class is the sub-folder's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ditserve.model.data.examples import DataError
from ditserve.model.data.image_files import SUFFIXES, ImageFiles
from ditserve.model.data.labels import Catalogue


def read_folder(path: Path, *, captions: bool) -> tuple[ImageFiles, Catalogue]:
    """The pictures below `path` in the order of torchvision's ImageFolder: by class, then by path.

    If every class has the same sub-folders and nothing beside them, these are the styles. A folder without sub-folders has no
    classes. With `captions`, each picture's is the text file beside it, `fox.txt` for `fox.png`, or empty.

    Raises:
        DataError: there are no pictures, or a caption is not UTF-8.
    """
    names = _folders(path)
    styles = _styles(path, names)
    files: list[Path] = []
    y: list[int] = []
    s: list[int] = []
    places = [
        (k, m, path / name / style) for k, name in enumerate(names) for m, style in enumerate(styles or [""])
    ]
    for k, m, place in places or [(0, 0, path)]:
        found = list(_pictures(place))
        files += found
        y += [k] * len(found)
        s += [m] * len(found)
    if not files:
        raise DataError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    spans = np.stack([np.arange(len(files)), np.zeros(len(files), int), np.full(len(files), -1)], axis=1)
    images = ImageFiles(tuple(files), spans, tuple(str(file) for file in files))
    told = tuple(_caption(file) for file in files) if captions else ()
    return images, Catalogue(np.array(y), tuple(names), np.array(s), tuple(styles), captions=told)


def _folders(path: Path) -> list[str]:
    return sorted(each.name for each in os.scandir(path) if each.is_dir() and not each.name.startswith("."))


def _styles(path: Path, names: list[str]) -> list[str]:
    inner = [_folders(path / name) for name in names]
    loose = any(file.suffix.lower() in SUFFIXES for name in names for file in (path / name).iterdir())
    return inner[0] if inner and inner.count(inner[0]) == len(inner) and not loose else []


def _pictures(path: Path) -> Iterator[Path]:
    for root, _, files in sorted(os.walk(path)):
        for file in sorted(files):
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith("."):
                yield Path(root, file)


def _caption(file: Path) -> str:
    beside = file.with_suffix(".txt")
    try:
        return beside.read_text("utf-8").strip() if beside.is_file() else ""
    except UnicodeDecodeError:
        raise DataError(f"{beside} is not UTF-8 text") from None
