"""Sources of data: a table from the kind of a path to its reader, and the card with licence and credits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ditserve.model.data.arrays import read_arrays
from ditserve.model.data.examples import DataError, Images
from ditserve.model.data.folder import CARD, has_class_folders, is_hidden, read_folder
from ditserve.model.data.image_files import Check, ImageFiles, examine
from ditserve.model.data.labels import Catalogue, LeftOut
from ditserve.model.data.latents import INDEX, Moments, read_latents
from ditserve.model.data.tar import read_tar
from ditserve.model.spec.bundle_bounds import FASTEST, SLOWEST
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.sizes import FirstAxis, Size, size_name

KNOWN = (
    "an .npz or a folder of them, a folder of pictures in a sub-folder per class, tar files, or latent shards"
)
NAMED = 5  # broken pictures that a message names


class DataCard(BaseModel):
    """The licence and credits of a data set: `card.json` in a folder, or `emoji.json` beside `emoji.npz`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    licence: str | None = None
    """An SPDX expression, for what is trained on the data."""
    attribution: tuple[str, ...] = ()
    """Credits that must be given, one line each."""
    first_axis: FirstAxis | None = None
    """The meaning of the first axis of clips (frames) or volumes (depth); pictures have none."""
    fps: Annotated[float, Field(ge=SLOWEST, le=FASTEST)] | None = None
    """The frames of a clip that are shown in a second."""

    @model_validator(mode="after")
    def _frames_have_a_pace(self) -> DataCard:
        if (self.fps is None) == (self.first_axis == "frames"):
            raise ValueError("fps: frames need it, the frames in a second, and nothing else has it")
        return self


def card_file(source: Path) -> Path:
    """Return the path of a data set's card."""
    return source / CARD if source.is_dir() else source.with_suffix(".json")


def read_card(source: Path) -> DataCard:
    """Return the card of a data set, an empty one if it has none.

    Raises:
        DataError: the card has an unknown field or a value of the wrong type.
    """
    file = card_file(source)
    if not file.is_file():
        return DataCard()
    try:
        return DataCard.model_validate_json(file.read_bytes())
    except ValidationError as error:
        field, message = wrong_field(error)
        raise DataError(f"{file}: {field or 'card'}: {message}") from None


class Reader(Protocol):
    def __call__(self, path: Path, *, captions: bool) -> tuple[Images | Moments, Catalogue, LeftOut]: ...


@dataclass(frozen=True, slots=True)
class SourceKind:
    """A kind of source: files that match the pattern `file`, or folders that hold one of `entries`.

    `strays` are entries that tell the kind only where no sub-folder holds pictures: beside class folders a
    `stats.npz` is no data.
    """

    name: str
    file: str
    entries: tuple[str, ...]
    strays: tuple[str, ...]
    read: Reader

    def fits(self, path: Path) -> bool:
        if not path.is_dir():
            return fnmatch(path.name, self.file)
        return _holds(path, self.entries) or (_holds(path, self.strays) and not has_class_folders(path))


def _holds(path: Path, patterns: Sequence[str]) -> bool:
    return any(not is_hidden(entry.name) for pattern in patterns for entry in path.glob(pattern))


# The first that fits is taken.
KINDS = (
    SourceKind("latent shards", "", (INDEX,), (), read_latents),
    SourceKind("arrays", "*.npz", ("x.npy", "*/x.npy"), ("*.npz",), read_arrays),
    SourceKind("tar files", "*.tar", (), ("*.tar",), read_tar),
    SourceKind("image folder", "", ("*",), (), read_folder),
)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Everything that a path holds, before any selection.

    `sizes` counts the (H, W) of the readable pictures, or the (F, H, W) of clips and volumes; `broken` has a
    message for each unreadable one.
    `left_out` counts the pictures beside these that are not used.
    """

    path: Path
    kind: str
    data: Images | Moments
    catalogue: Catalogue
    card: DataCard
    sizes: Counter[Size]
    broken: tuple[str, ...]
    left_out: LeftOut

    @property
    def first_sides(self) -> Size:
        """The frames of clips or the depth of volumes, of which a set has one number; () of pictures."""
        return next(iter(self.sizes), ())[:-2]


def read_source(path: Path, *, captions: bool = False, check: Check | None = "decode") -> Source:
    """Read the data set at `path`, of any kind.

    Image files are examined as `check` says, and broken ones left out. With `check=None` they are not
    examined, and `sizes` is empty.

    Raises:
        DataError: the path does not exist, is of no known kind, damaged, or holds nothing readable.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: pass {KNOWN}")
    kind = next((kind for kind in KINDS if kind.fits(path)), None)
    if kind is None:
        raise DataError(f"{path} is no data set: pass {KNOWN}")
    data, catalogue, left_out = kind.read(path, captions=captions)
    sizes: Counter[Size] = Counter()
    broken: tuple[str, ...] = ()
    if not isinstance(data, ImageFiles):
        size = data.index.size if isinstance(data, Moments) else data[0].shape[:-1]
        sizes[tuple(size)] = len(data)
    elif check:
        examination = examine(data, check)
        data, catalogue = data.take(examination.readable), catalogue.take(examination.readable)
        sizes, broken = Counter(examination.sizes), examination.broken
        if not len(data):
            raise DataError(f"{path} holds no readable picture: {broken[0]}")
    source = Source(path, kind.name, data, catalogue, read_card(path), sizes, broken, left_out)
    if bool(source.first_sides) != (source.card.first_axis is not None):
        mistake = (
            "say what the first of three axes is, frames or depth"
            if source.first_sides
            else ("these are pictures, which have none")
        )
        raise DataError(f"{card_file(path)}: field first_axis: {mistake}")
    return source


def common_size(source: Source) -> Size:
    """Return the size, (H, W) or (F, H, W), that all pictures have.

    Raises:
        DataError: they differ.
    """
    if len(source.sizes) > 1:
        first, second = (size_name(size, "×") for size in list(source.sizes)[:2])
        raise DataError(
            f"{source.path} holds pictures of different sizes ({first}, {second}): "
            "set the size to crop them to"
        )
    return next(iter(source.sizes))


def check_corrupt_limit(path: Path, broken: Sequence[str], limit: int) -> None:
    """Refuse more broken pictures than `limit`.

    Raises:
        DataError: there are more; it names the first few.
    """
    if len(broken) > limit:
        raise DataError(
            f"{path}: {len(broken)} pictures cannot be read, and corrupt_limit is {limit}: "
            f"{'; '.join(broken[:NAMED])}"
        )
