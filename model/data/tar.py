"""Tar files as WebDataset writes them: the members of one sample share the name before the first dot."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ditserve.model.data.examples import DataError
from ditserve.model.data.folder import check_splits, count_pictures, is_hidden, visible
from ditserve.model.data.image_files import SUFFIXES, ImageFiles
from ditserve.model.data.labels import Catalogue, LeftOut

TEXTS = ("cls", "json", "txt")
LONGEST = 1 << 20  # bytes of a text member
NUMBER = re.compile(r"-?\d{1,9}", re.ASCII)


@dataclass(slots=True)
class TarSample:
    """The members that share a key.

    `span` is (archive index, first byte, length) of the picture. `texts` holds the text members by suffix.
    """

    name: str
    span: tuple[int, int, int] | None
    texts: dict[str, str]


def read_tar(path: Path, *, captions: bool) -> tuple[ImageFiles, Catalogue, LeftOut]:
    """Read the samples of a tar file, or of all tar files of a folder in the order of their names.

    A sample is `key.jpg` with `key.cls` or `key.json`, and `key.txt`. `cls` holds the class as a number or a
    name; `json` may have `label`, `style` and `caption`; `txt` is the caption. Class numbers are looked up in
    `classes.txt` beside the tar files (one name a line), if it is there. The pictures are read inside the
    archives: nothing is unpacked.

    Raises:
        DataError: an archive is damaged, a sample lacks a picture or a label, or a text cannot be read.
    """
    archives = visible(path, "*.tar") if path.is_dir() else [path]
    check_splits(path, [archive.stem for archive in archives], "shards of one set")
    left_out = Counter({"beside the tar files": count_pictures(path) if path.is_dir() else 0})
    samples = [sample for k, archive in enumerate(archives) for sample in _samples(k, archive, left_out)]
    if not samples:
        raise DataError(f"{path} holds no pictures{LeftOut(left_out).suffix()}")
    labels = [_labels(sample) for sample in samples]
    class_names = _listed_classes(archives[0].parent)
    y, names = _number_classes([label.get("label") for label in labels], samples, class_names)
    s, styles = _number_classes([label.get("style") for label in labels], samples, ())
    spans = np.array([sample.span for sample in samples], np.int64)
    images = ImageFiles(tuple(archives), spans, tuple(sample.name for sample in samples))
    texts = tuple(str(label.get("caption", "")) for label in labels) if captions else ()
    return images, Catalogue(y, names, s, styles, captions=texts), LeftOut(left_out)


def _samples(number: int, archive: Path, left_out: Counter[str]) -> Iterator[TarSample]:
    """Yield the samples of an archive, and count in `left_out` the members that belong to none."""
    samples: dict[str, TarSample] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            while member := tar.next():
                # Forget the member: else the index of a large archive stays in memory.
                tar.members = []  # type: ignore[attr-defined]
                if reason := _reason_to_leave_out(member):
                    left_out[reason] += 1
                if reason is not None:
                    continue
                folder, _, file = member.name.rpartition("/")
                key, _, suffix = file.partition(".")
                name = f"{archive}: {member.name}"
                sample = samples.setdefault(f"{folder}/{key}", TarSample(name, None, {}))
                if suffix.lower() in TEXTS:
                    sample.texts[suffix.lower()] = _text(tar, member, archive)
                else:
                    left_out["a further picture of one sample"] += sample.span is not None
                    sample.name, sample.span = name, (number, member.offset_data, member.size)
            _check_end(archive, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{archive} is not a readable, uncompressed tar file: {error}") from None
    for sample in samples.values():
        if sample.span is None:
            raise DataError(f"{sample.name} has no picture of the same name beside it")
        yield sample


def _reason_to_leave_out(member: tarfile.TarInfo) -> str | None:
    """Return the reason to leave a member out, empty if it need not be told; None for a part of a sample."""
    file = Path(member.name)
    suffix = file.name.partition(".")[2].lower()
    if member.isdir():
        return ""
    if any(is_hidden(part) for part in file.parts if part != ".."):
        return "hidden" if file.suffix.lower() in SUFFIXES else ""
    if not member.isreg() or member.issparse():
        return "a link or no regular file"
    if suffix in TEXTS or f".{suffix}" in SUFFIXES:
        return None
    if file.suffix.lower() in SUFFIXES:
        return "another part of its sample: a second dot stands in its name"
    return f"not a picture ({file.suffix.lower() or 'no suffix'})"


def _check_end(archive: Path, offset: int) -> None:
    """Check that an archive ends at `offset`: tarfile takes a cut or damaged header for the end."""
    with archive.open("rb") as raw:
        raw.seek(offset)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it breaks off or is damaged at byte {offset}")


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Path) -> str:
    stream = tar.extractfile(member)
    if stream is None or member.size > LONGEST:
        raise DataError(f"{archive}: {member.name} is longer than {LONGEST} bytes")
    try:
        return stream.read().decode().strip()
    except UnicodeDecodeError:
        raise DataError(f"{archive}: {member.name} is not UTF-8 text") from None


def _labels(sample: TarSample) -> dict[str, object]:
    """Return `label`, `style` and `caption` if the sample has them; `cls` and `txt` win over `json`."""
    try:
        labels = json.loads(sample.texts.get("json", "{}"))
    except ValueError as error:
        raise DataError(f"{sample.name}: its json is not valid: {error}") from None
    if not isinstance(labels, dict):
        raise DataError(f"{sample.name}: its json must be an object")
    texts = {"label": sample.texts.get("cls"), "caption": sample.texts.get("txt")}
    return labels | {key: text for key, text in texts.items() if text is not None}


def _number_classes(
    labels: list[object], samples: list[TarSample], class_names: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return the class of each sample (N,), and the names of the classes.

    If no sample has a label, these are zeros and no names.
    """
    words = [None if label is None else str(label) for label in labels]
    distinct = {word for word in words if word is not None}
    if not distinct:
        return np.zeros(len(words), np.int64), ()
    if None in words:
        raise DataError(f"{samples[words.index(None)].name} lacks a label or style that other samples have")
    numbered = all(NUMBER.fullmatch(word) for word in distinct)
    if numbered and class_names:
        return np.array([int(word or 0) for word in words]), class_names
    names = tuple(sorted(distinct, key=int if numbered else str))
    number = {name: k for k, name in enumerate(names)}
    return np.array([number[word] for word in words if word is not None]), names


def _listed_classes(folder: Path) -> tuple[str, ...]:
    file = folder / "classes.txt"
    try:
        return tuple(file.read_text("utf-8").splitlines()) if file.is_file() else ()
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text") from None
