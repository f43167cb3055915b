"""Folders of pictures: the class of a picture is the name of its sub-folder, its style that of the next one.

Every file of the folder is either a picture, a caption, the card, or counted in `LeftOut`. Reading a folder
follows these rules:

    hidden         `.x`, `._x`, `__MACOSX`, `Thumbs.db` and the like are left out, at every depth
    links          are followed; a folder that several links lead to is read once; a loop is refused
    no suffix      or an unknown one: the first bytes decide
    train/ val/    side by side are splits, not classes: refused, because the choice is the user's
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ditserve.model.data.examples import DataError
from ditserve.model.data.image_files import SUFFIXES, ImageFiles
from ditserve.model.data.labels import Catalogue, LeftOut

CARD = "card.json"
HIDDEN_NAMES = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"})
# JPEG, PNG, GIF, WebP, AVIF and JPEG 2000. Raw photographs begin like TIFF, so TIFF is left to its suffix.
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|.{4}ftypavi[fs]|\x00{3}\x0cjP {2}|\xffO\xffQ",
    re.S,
)
TRAINING_SPLIT = re.compile(r"train(ing)?([-_. ]?\d+)*", re.I)
OTHER_SPLIT = re.compile(r"(val|valid|validation|dev|eval|test|testing)([-_. ]?\d+)*", re.I)


def is_hidden(name: str) -> bool:
    """Return True for the names that operating systems hide or leave behind."""
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def visible(path: Path, pattern: str) -> list[Path]:
    """Return the entries of a folder that match a pattern and are not hidden, by name."""
    return sorted(entry for entry in path.glob(pattern) if not is_hidden(entry.name))


def count_pictures(path: Path) -> int:
    """Return the number of files with a picture's suffix at or below `path`; links are not followed."""
    if not path.is_dir():
        return int(path.suffix.lower() in SUFFIXES)
    return sum(Path(file).suffix.lower() in SUFFIXES for _, _, files in os.walk(path) for file in files)


def check_splits(path: Path, names: Iterable[str], kind: str) -> None:
    """Refuse names that are those of a training split and of others, and hence not of `kind`.

    Raises:
        DataError: naming the choice.
    """
    training = [name for name in names if TRAINING_SPLIT.fullmatch(name)]
    others = [name for name in names if OTHER_SPLIT.fullmatch(name)]
    if training and others:
        raise DataError(
            f"{path} holds {training[0]!r} and {others[0]!r}, which are splits rather than {kind}: "
            f"set data.path to the one to train on, or rename them if they are {kind}"
        )


@dataclass(slots=True)
class FolderScan:
    """The files below `root`: `pictures` by their path's parts, `texts`, and the count of what is left out.

    Raises:
        DataError: a link leads back to a folder above it, or a folder cannot be read.
    """

    root: Path
    pictures: list[tuple[str, ...]] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        entered: set[Path] = set()
        folders: list[tuple[str, ...]] = [()]
        links: list[tuple[str, ...]] = []
        # Real folders come first: a folder and a link to it make one class, the folder's.
        while folders or links:
            if not folders and not self._leads_on(links[0], entered):
                links.pop(0)
                continue
            parts = folders.pop() if folders else links.pop(0)
            entered.add(self.root.joinpath(*parts).resolve())
            self._enter(parts, folders, links)
        known = {(*parts[:-1], Path(parts[-1]).stem) for parts in self.pictures}
        for parts in self.texts:
            if (*parts[:-1], Path(parts[-1]).stem) not in known:
                self.left_out["not a picture (.txt)"] += 1

    def _leads_on(self, parts: tuple[str, ...], entered: set[Path]) -> bool:
        """Return True if the link at `parts` leads to a folder that is not read yet."""
        link = self.root.joinpath(*parts)
        target = link.resolve()
        if link.parent.resolve().is_relative_to(target):
            raise DataError(f"{link} leads back to {target}, a folder above it: remove this link")
        if target in entered:
            self.left_out["in a folder that is read already, through a link to it"] += count_pictures(target)
        return target not in entered

    def _enter(
        self, parts: tuple[str, ...], folders: list[tuple[str, ...]], links: list[tuple[str, ...]]
    ) -> None:
        folder = self.root.joinpath(*parts)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}") from None
        for entry in entries:
            inner = (*parts, entry.name)
            if is_hidden(entry.name):
                self.left_out["hidden"] += count_pictures(entry)
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(inner)
            else:
                self._add(inner, entry)

    def _add(self, parts: tuple[str, ...], file: Path) -> None:
        suffix = file.suffix.lower()
        if not file.is_file():
            self.left_out["a broken link or no regular file"] += 1
        elif suffix in SUFFIXES or (suffix != ".txt" and _begins_like_a_picture(file)):
            self.pictures.append(parts)
        elif suffix == ".txt":
            self.texts.append(parts)
        elif parts != (CARD,):
            self.left_out[f"not a picture ({suffix or 'no suffix'})"] += 1


def _begins_like_a_picture(file: Path) -> bool:
    try:
        with file.open("rb") as raw:
            return MAGIC.match(raw.read(16)) is not None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def has_class_folders(path: Path) -> bool:
    """Return True if a visible sub-folder of `path` holds a picture."""
    return any(
        Path(name).suffix.lower() in SUFFIXES and not is_hidden(name)
        for folder in visible(path, "*")
        if folder.is_dir()
        for _, names in _visible_files(folder)
        for name in names
    )


def _visible_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield root, files


def read_folder(path: Path, *, captions: bool) -> tuple[ImageFiles, Catalogue, LeftOut]:
    """Read the pictures below `path` in the order of torchvision's ImageFolder: by class, then by path.

    If every class has the same sub-folders and no picture beside them, these sub-folders are the styles. A
    folder whose sub-folders hold no pictures has no classes. With `captions`, a picture's caption is the text
    file beside it (`fox.txt` for `fox.png`), or empty.

    Raises:
        DataError: there are no pictures, a caption is not UTF-8, or as `FolderScan` and `check_splits`.
    """
    scan = FolderScan(path)
    names = tuple(folder.name for folder in visible(path, "*") if folder.is_dir())
    pictures = [parts for parts in scan.pictures if len(parts) > 1]
    check_splits(path, {parts[0] for parts in pictures}, "classes")
    if not pictures:
        names, pictures = (), scan.pictures
    elif loose := len(scan.pictures) - len(pictures):
        scan.left_out["loose beside the class folders"] += loose
    if not pictures:
        raise DataError(f"{path} holds no pictures{LeftOut(scan.left_out).suffix()}")
    styles, remarks = _styles(path, pictures) if names else ((), ())
    depth = bool(names) + bool(styles)
    pictures.sort(key=lambda parts: (parts[:depth], "/".join(parts[:-1]), parts[-1]))
    files = tuple(path.joinpath(*parts) for parts in pictures)
    number, style_number = ({name: k for k, name in enumerate(words)} for words in (names, styles))
    catalogue = Catalogue(
        np.array([number[parts[0]] if names else 0 for parts in pictures]),
        names,
        np.array([style_number[parts[1]] if styles else 0 for parts in pictures]),
        styles,
        captions=tuple(_caption(file) for file in files) if captions else (),
    )
    spans = np.stack([np.arange(len(files)), np.zeros(len(files), int), np.full(len(files), -1)], axis=1)
    images = ImageFiles(files, spans, tuple(str(file) for file in files))
    return images, catalogue, LeftOut(scan.left_out, remarks)


def _styles(path: Path, pictures: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the styles, and a remark if the classes have sub-folders that are none."""
    inner = {
        name: {folder.name for folder in visible(path / name, "*") if folder.is_dir()}
        for name in sorted({parts[0] for parts in pictures})
    }
    every = {parts[1] for parts in pictures if len(parts) > 2}
    if not every:
        return (), ()
    check_splits(path, every, "styles")
    loose = next(("/".join(parts) for parts in pictures if len(parts) == 2), None)
    first, *others = inner.values()
    if all(other == first for other in others) and not loose:
        return tuple(sorted(first)), ()
    reason = f"{loose} lies beside them" if loose else "they differ from class to class"
    return (), (f"the sub-folders of the classes are not read as styles, because {reason}",)


def _caption(file: Path) -> str:
    text_file = file.with_suffix(".txt")
    try:
        return text_file.read_text("utf-8").strip() if text_file.is_file() else ""
    except UnicodeDecodeError:
        raise DataError(f"{text_file} is not UTF-8 text") from None
