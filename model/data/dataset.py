"""What a trainer sees of its data, and where data can come from.

    dataset = DataConfig(path=Path("photos"), size=64, flip=True).open()
    index = dataset.training[batch_indices(len(dataset.training), 32, step, seed)]
    x0 = dataset.batch(index, np.random.default_rng([seed, step]))        # (32, 3, 64, 64) in [−1, 1]

A batch is a function of its arguments alone, so that training can stop and resume anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from ditserve.model.data.examples import DataError, Pictures
from ditserve.model.data.image_files import Check
from ditserve.model.data.labels import select
from ditserve.model.data.latents import Latents, Moments
from ditserve.model.data.sources import Source, common_size, read_source, tolerate
from ditserve.model.spec.bundle import Factor

__all__ = ["DataConfig", "DataError", "Dataset"]


class Dataset(Protocol):
    """N pictures or latents with what they show."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of a batch."""
        ...

    @property
    def channels(self) -> int:
        """C of a batch."""
        ...

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The label factors; empty where only captions tell what is shown."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N, F): each factor's class."""
        ...

    @property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """(N,): kept from training."""
        ...

    @property
    def training(self) -> npt.NDArray[np.int64]:
        """Indices that may be trained on."""
        ...

    @property
    def text(self) -> npt.NDArray[np.float32] | None:
        """(N, text_size) embeddings of the captions, None where none are asked for. Computed when first read.

        Raises:
            DataError: the encoder cannot be opened.
        """
        ...

    @property
    def licence(self) -> str | None:
        """The licence a bundle trained on this carries; None where the data has no card."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """What could not be read and was left out, a picture's name and reason each."""
        ...

    @property
    def attribution(self) -> tuple[str, ...]:
        """Who must be credited, one line each."""
        ...

    def batch(self, index: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """What the network denoises, (n, C, H, W): pixels in [−1, 1], or normalised latents.

        `rng` decides mirroring and the draw from a latent's posterior. May be called from several threads.

        Raises:
            DataError: a picture can no longer be read.
        """
        ...

    def resized(self, size: tuple[int, int]) -> Dataset:
        """The same data at (H, W), for progressive training.

        Raises:
            DataError: latents, which have one size.
        """
        ...


Side = Annotated[int, Field(ge=1)]


class DataConfig(BaseModel):
    """Which data to train on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    path: Path
    """An .npz or a folder of array shards, a folder of pictures, tar files, or latent shards."""
    groups: tuple[str, ...] = ()
    """Train on the names of these groups; with `names`, on the union. Both empty: on everything."""
    names: tuple[str, ...] = ()
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of (name, style) pairs kept from training; without styles, of each name's pictures."""
    size: Side | tuple[Side, Side] | None = None
    """Crop and resample pictures to this many pixels, or to (H, W). None: they have one size already."""
    flip: bool = False
    """Mirror half of the pictures: for photographs, not where left and right differ."""
    text: str | None = None
    """The text encoder (a name of `model.text`) for captions; None leaves captions out."""
    corrupt_limit: Annotated[int, Field(ge=0)] = 0
    """How many unreadable pictures are left out; beyond it the data is refused."""
    check: Check = "decode"
    """How pictures are examined at opening: decoded whole, or for huge sets by their headers. Then a picture that turns out to be
    damaged later stops the run."""
    latent_scale: Annotated[float, Field(gt=0)] | None = None
    """Multiply latents by this (0.18215: what published weights were trained on) instead of normalising each channel."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """Batches made ahead, each in a thread of its own; 0 makes each when it is needed."""

    def open(self, path: Path | None = None) -> Dataset:
        """The data, at `path` if it has moved.

        Raises:
            DataError: it is not there or cannot be trained on.
        """
        source = read_source(path or self.path, captions=self.text is not None, check=self.check)
        tolerate(source.path, source.broken, self.corrupt_limit)
        examples = select(
            source.catalogue,
            source.path,
            groups=self.groups,
            names=self.names,
            hold_out=self.hold_out,
            captioned=self.text is not None,
        )
        shared: dict[str, Any] = {
            **vars(examples),
            "encoder": self.text,
            "flip": self.flip,
            "licence": source.card.licence,
            "attribution": source.card.attribution,
            "skipped": source.broken,
        }
        size = self._size(source)
        if isinstance(source.data, Moments):
            shift, scale = source.data.normalisation(self.latent_scale)
            shared["skipped"] = source.data.index.skipped
            return Latents(moments=source.data, shift=shift, scale=scale, **shared).resized(size)
        return Pictures(images=source.data, size=size, **shared)

    def _size(self, source: Source) -> tuple[int, int]:
        if self.size is not None:
            return (self.size, self.size) if isinstance(self.size, int) else self.size
        return common_size(source)
