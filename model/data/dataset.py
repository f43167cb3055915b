"""The data set as a trainer sees it, and the configuration that opens one.

    dataset = DataConfig(path=Path("photos"), size=64, flip=True).open()
    index = dataset.training[batch_indices(len(dataset.training), 32, step, seed)]
    x0 = dataset.batch(index, np.random.default_rng([seed, step]))  # (32, 3, 64, 64) in [−1, 1]

A batch is a function of its arguments alone, so training can stop and resume anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ditserve.model.data.examples import DataError, Pictures
from ditserve.model.data.image_files import Check
from ditserve.model.data.labels import select_examples
from ditserve.model.data.latents import Latents, Moments
from ditserve.model.data.sources import Source, check_corrupt_limit, common_size, read_source
from ditserve.model.data.texts import Texts
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.sizes import FirstAxis, Size, size_name

__all__ = ["DataConfig", "DataError", "Dataset"]


class Dataset(Protocol):
    """N pictures or latents with their labels."""

    @property
    def size(self) -> Size:
        """The (H, W) of a batch; of clips and volumes (F, H, W)."""
        ...

    @property
    def first_axis(self) -> FirstAxis | None:
        """The meaning of the first of three axes; None: there are two."""
        ...

    @property
    def fps(self) -> float | None:
        """The frames of a clip that are shown in a second."""
        ...

    @property
    def channels(self) -> int:
        """The number of channels of a batch."""
        ...

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The label factors; empty if the data has captions only."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The class of each factor, (N, F)."""
        ...

    @property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """The mask of the examples kept from training, (N,)."""
        ...

    @property
    def training(self) -> npt.NDArray[np.int64]:
        """Indices of the examples that may be trained on."""
        ...

    @property
    def texts(self) -> Texts | None:
        """The captions, encoded, or None without an encoder. It is opened when this is first read.

        Raises:
            DataError: the encoder cannot be opened.
        """
        ...

    @property
    def licence(self) -> str | None:
        """The licence of bundles trained on this data; None if the data has no card."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Messages about unreadable pictures that were left out: name and reason."""
        ...

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sentences on the pictures that are there and not used: their number and the reason."""
        ...

    @property
    def attribution(self) -> tuple[str, ...]:
        """Credits that must be given, one line each."""
        ...

    def batch(self, index: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Return the clean samples x0 of a batch, (n, C, H, W): pixels in [−1, 1], or normalised latents.

        `rng` decides mirroring and the draw from a latent's posterior. Several threads may call this at once.

        Raises:
            DataError: a picture can no longer be read.
        """
        ...

    def part(self, index: npt.NDArray[np.int64]) -> Dataset:
        """Return the examples at `index` (n,) as a data set."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return checksums of what the pictures show, by "first–last" number.

        Raises:
            DataError: a picture can no longer be read.
        """
        ...

    def resized(self, size: Size) -> Dataset:
        """Return the same data at `size`, for progressive training.

        Raises:
            DataError: the data are latents of another size.
        """
        ...


def _named(path: Any) -> Any:
    if isinstance(path, str) and not path.strip():
        raise ValueError("it is empty, which would mean the working folder: name a file or a folder")
    return path


NamedPath = Annotated[Path, BeforeValidator(_named)]
Side = Annotated[int, Field(ge=1)]


class DataConfig(BaseModel):
    """The choice of training data."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    path: NamedPath
    """An .npz or a folder of array shards, a folder of pictures, tar files, or latent shards."""
    groups: tuple[str, ...] = ()
    """Train on the names of these groups; with `names`, on the union. If both are empty, on everything."""
    names: tuple[str, ...] = ()
    crossed: bool = True
    """Train only on names that are drawn in every style, so that names and styles cross."""
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the (name, style) pairs kept from training; without styles, of the pictures of each name."""
    size: Side | tuple[Side, Side] | tuple[Side, Side, Side] | None = None
    """Crop and resample pictures to this many pixels, or to (H, W). None if they have one size already.
    Clips keep their number of frames, which may be said, as (F, H, W)."""
    flip: bool = False
    """Mirror half of the pictures. Good for photographs; wrong where left and right differ in meaning."""
    text: str | None = None
    """The text encoder of the captions (a name of `model.nets.text`); None leaves captions out.
    Each line of a caption is a wording of it; one is drawn for each step."""
    text_tokens: Annotated[int, Field(ge=0, le=512)] = 0
    """The tokens of a caption that the network attends to; 0: it takes the caption's embedding alone."""
    corrupt_limit: Annotated[int, Field(ge=0)] = 0
    """The number of unreadable pictures that are left out; with more, the data is refused."""
    check: Check = "decode"
    """The examination of pictures at opening: decode them whole, or for huge sets read only the headers.
    In the second case a picture that turns out to be damaged later stops the run."""
    latent_scale: Annotated[float, Field(gt=0)] | None = None
    """Multiply latents by this instead of normalising each channel; published weights used 0.18215."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """The number of batches made ahead, each in its own thread; 0 makes each batch when it is needed."""

    def open(self, path: Path | None = None) -> Dataset:
        """Open the data set, at `path` if it has moved.

        Raises:
            DataError: the data does not exist or cannot be trained on.
        """
        source = read_source(path or self.path, captions=self.text is not None, check=self.check)
        check_corrupt_limit(source.path, source.broken, self.corrupt_limit)
        examples = select_examples(
            source.catalogue,
            source.path,
            groups=self.groups,
            names=self.names,
            crossed=self.crossed,
            hold_out=self.hold_out,
            captioned=self.text is not None,
            left_out=source.left_out,
        )
        shared: dict[str, Any] = {
            **vars(examples),
            "encoder": self.text,
            "text_tokens": self.text_tokens,
            "flip": self.flip,
            "licence": source.card.licence,
            "attribution": source.card.attribution,
            "first_axis": source.card.first_axis,
            "fps": source.card.fps,
            "skipped": source.broken,
        }
        size = self.size_of(source)
        if isinstance(source.data, Moments):
            shift, scale = source.data.normalisation(self.latent_scale)
            shared["skipped"] = source.data.index.skipped
            return Latents(moments=source.data, shift=shift, scale=scale, **shared).resized(size)
        return Pictures(images=source.data, size=size, **shared)

    def size_of(self, source: Source) -> Size:
        """Return the size of batches of a source's pictures, clips or volumes.

        Raises:
            DataError: the pictures differ and no size is said, or the size has another first axis.
        """
        if self.size is None:
            return common_size(source)
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        first = source.first_sides
        if size[:-2] not in (first, ()):
            held = f"clips of {first[0]} frames" if first else "pictures"
            raise DataError(
                f"field size: {size_name(size)} is for clips of {size[0]} frames, and {source.path} holds "
                f"{held}: give height and width alone"
            )
        return (*first, *size[-2:])
