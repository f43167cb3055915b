"""Where data can come from: a table from what a path looks like to who reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from ditserve.model.data.arrays import read_arrays
from ditserve.model.data.card import Card, read_card
from ditserve.model.data.examples import DataError, Images
from ditserve.model.data.folder import read_folder
from ditserve.model.data.image_files import Check, ImageFiles, examine
from ditserve.model.data.labels import Catalogue
from ditserve.model.data.latents import INDEX, Moments, read_latents
from ditserve.model.data.tar import read_tar

KNOWN = (
    "an .npz or a folder of them, a folder of pictures in a sub-folder per class, tar files, or latent shards"
)
NAMED = 5  # broken pictures that a message names


class Read(Protocol):
    def __call__(self, path: Path, *, captions: bool) -> tuple[Images | Moments, Catalogue]: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of source: a file with such a name, or a folder with such an entry."""

    what: str
    file: str
    entries: tuple[str, ...]
    read: Read

    def fits(self, path: Path) -> bool:
        if path.is_dir():
            return any(any(path.glob(entry)) for entry in self.entries)
        return fnmatch(path.name, self.file)


# The first that fits is taken.
KINDS = (
    Kind("latent shards", "", (INDEX,), read_latents),
    Kind("arrays", "*.npz", ("*.npz", "x.npy", "*/x.npy"), read_arrays),
    Kind("tar files", "*.tar", ("*.tar",), read_tar),
    Kind("image folder", "", ("*",), read_folder),
)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """All that a path holds, before any choice.

    `sizes` counts the (H, W) of what can be read, `broken` says what cannot, and why.
    """

    path: Path
    kind: str
    data: Images | Moments
    catalogue: Catalogue
    card: Card
    sizes: Counter[tuple[int, int]]
    broken: tuple[str, ...]


def read_source(path: Path, *, captions: bool = False, check: Check | None = "decode") -> Source:
    """What `path` holds, whatever kind it is. Encoded pictures are examined, and broken ones left out; not without `check`.

    Raises:
        DataError: it is not there, of no known kind, damaged, or holds nothing readable.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: pass {KNOWN}")
    kind = next((kind for kind in KINDS if kind.fits(path)), None)
    if kind is None:
        raise DataError(f"{path} is no data set: pass {KNOWN}")
    data, catalogue = kind.read(path, captions=captions)
    sizes: Counter[tuple[int, int]] = Counter()
    broken: tuple[str, ...] = ()
    if not isinstance(data, ImageFiles):
        height, width = data.index.size if isinstance(data, Moments) else data[0].shape[:2]
        sizes[height, width] = len(data)
    elif check:
        examined = examine(data, check)
        data, catalogue = data.take(examined.readable), catalogue.take(examined.readable)
        sizes, broken = examined.sizes, examined.broken
        if not len(data):
            raise DataError(f"{path} holds no readable picture: {broken[0]}")
    return Source(path, kind.what, data, catalogue, read_card(path), sizes, broken)


def common_size(source: Source) -> tuple[int, int]:
    """The (H, W) that all pictures have.

    Raises:
        DataError: they differ.
    """
    if len(source.sizes) > 1:
        first, second = (f"{height}×{width}" for height, width in list(source.sizes)[:2])
        raise DataError(
            f"{source.path} holds pictures of different sizes ({first}, {second}): set the size to crop them to"
        )
    return next(iter(source.sizes))


def tolerate(path: Path, broken: Sequence[str], limit: int) -> None:
    """Refuse more broken pictures than `limit`.

    Raises:
        DataError: naming the first few.
    """
    if len(broken) > limit:
        raise DataError(
            f"{path}: {len(broken)} pictures cannot be read, and corrupt_limit is {limit}: {'; '.join(broken[:NAMED])}"
        )
