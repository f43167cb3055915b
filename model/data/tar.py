"""Pictures in tar files, as WebDataset writes them: members of one sample share the name before the first dot."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ditserve.model.data.examples import DataError
from ditserve.model.data.image_files import SUFFIXES, ImageFiles
from ditserve.model.data.labels import Catalogue

TEXTS = ("cls", "json", "txt")
LONGEST = 1 << 20  # bytes of such a member
NUMBER = re.compile(r"-?\d{1,9}", re.ASCII)


@dataclass(slots=True)
class Sample:
    """One key's members: where its picture lies, and the texts beside it."""

    name: str
    span: tuple[int, int, int] | None
    texts: dict[str, str]


def read_tar(path: Path, *, captions: bool) -> tuple[ImageFiles, Catalogue]:
    """The samples of a tar file, or of a folder's in the order of their names: `key.jpg` with `key.cls` or `key.json`, `key.txt`.

    `cls` is a class's number or name; `json` may tell `label`, `style` and `caption`; `txt` is the caption. Numbers are looked up
    in `classes.txt` beside the tar files, a name a line, if it is there. Archives are read where they lie: nothing is unpacked.

    Raises:
        DataError: a damaged archive, a sample without picture or without the label others have, or text that cannot be read.
    """
    archives = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    samples = [sample for k, archive in enumerate(archives) for sample in _samples(k, archive)]
    if not samples:
        raise DataError(f"{path} holds no pictures")
    facts = [_facts(sample) for sample in samples]
    y, names = _classes([fact.get("label") for fact in facts], samples, _listed(archives[0].parent))
    s, styles = _classes([fact.get("style") for fact in facts], samples, ())
    spans = np.array([sample.span for sample in samples], np.int64)
    images = ImageFiles(tuple(archives), spans, tuple(sample.name for sample in samples))
    told = tuple(str(fact.get("caption", "")) for fact in facts) if captions else ()
    return images, Catalogue(y, names, s, styles, captions=told)


def _samples(number: int, archive: Path) -> Iterator[Sample]:
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # or the index of a large archive stays in memory
                folder, _, file = member.name.rpartition("/")
                key, _, kind = file.partition(".")
                if not member.isreg() or member.issparse() or not key:
                    continue
                sample = samples.setdefault(f"{folder}/{key}", Sample(f"{archive}: {member.name}", None, {}))
                if f".{kind.lower()}" in SUFFIXES:
                    sample.name, sample.span = (
                        f"{archive}: {member.name}",
                        (number, member.offset_data, member.size),
                    )
                elif kind in TEXTS:
                    sample.texts[kind] = _text(tar, member, archive)
            _check_end(archive, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{archive} is not a readable, uncompressed tar file: {error}") from None
    for sample in samples.values():
        if sample.span is None:
            raise DataError(f"{sample.name} has no picture of the same name beside it")
        yield sample


def _check_end(archive: Path, offset: int) -> None:
    """tarfile takes a header that is cut off or damaged for the end of the archive."""
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


def _facts(sample: Sample) -> dict[str, object]:
    """`label`, `style` and `caption` as far as the sample tells them."""
    try:
        facts = json.loads(sample.texts.get("json", "{}"))
    except ValueError as error:
        raise DataError(f"{sample.name}: its json is not valid: {error}") from None
    if not isinstance(facts, dict):
        raise DataError(f"{sample.name}: its json must be an object")
    told = {"label": sample.texts.get("cls"), "caption": sample.texts.get("txt")}
    return facts | {key: value for key, value in told.items() if value is not None}


def _classes(
    told: list[object], samples: list[Sample], listed: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Numbers and names of one factor; zeros and no names where no sample tells it."""
    words = [None if each is None else str(each) for each in told]
    different = {word for word in words if word is not None}
    if not different:
        return np.zeros(len(words), np.int64), ()
    if None in words:
        raise DataError(f"{samples[words.index(None)].name} lacks a label or style that other samples have")
    counted = all(NUMBER.fullmatch(word) for word in different)
    if counted and listed:
        return np.array([int(word or 0) for word in words]), listed
    names = tuple(sorted(different, key=int if counted else str))
    place = {name: k for k, name in enumerate(names)}
    return np.array([place[word] for word in words if word is not None]), names


def _listed(folder: Path) -> tuple[str, ...]:
    file = folder / "classes.txt"
    try:
        return tuple(file.read_text("utf-8").splitlines()) if file.is_file() else ()
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text") from None
