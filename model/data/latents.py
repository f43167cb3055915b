"""Latents prepared for training: an autoencoder's moments in safetensors shards, with an index.

    <folder>/latents.json      `Index`: sizes, class names, statistics, shards
    <folder>/00000.safetensors `mean` and `log_variance` float32 (n, 2, C, h, w), the second of the two of the mirrored picture;
                               `y` and `s` int64 (n,); `total` and `total_squares` float64 (C,), expected sums over draws; captions
                               and what was skipped as JSON in its metadata

The moments, not draws, are kept: each step draws anew, as encoding on the fly would.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from ditserve.model.data.examples import DataError, Examples
from ditserve.model.data.labels import Catalogue

INDEX = "latents.json"


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    count: int


class Index(BaseModel):
    """latents.json. `mean` and `std` are each channel's over the whole set, mirrored copies included, for draws from the posterior."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    autoencoder: str
    """sha256 of its weights."""
    picture_size: tuple[int, int]
    size: tuple[int, int]
    channels: int
    names: tuple[str, ...]
    styles: tuple[str, ...]
    groups: tuple[str, ...]
    shards: tuple[Shard, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()
    """Pictures that could not be read when the latents were made."""


class Moments:
    """Means and log-variances by number, read from the mapped shards when asked for."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self.shards = [_open(folder / shard.file) for shard in index.shards]
        self.ends = np.cumsum([shard.count for shard in index.shards])
        for shard, opened in zip(index.shards, self.shards, strict=True):
            wanted = [shard.count, 2, index.channels, *index.size]
            if any(list(opened.get_slice(name).get_shape()) != wanted for name in ("mean", "log_variance")):
                raise DataError(f"{folder / shard.file} does not hold the {wanted} moments that {INDEX} says")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int, *, mirrored: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and log-variance, both (C, h, w)."""
        place = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[place - 1]) if place else 0)
        shard = self.shards[place]
        return shard.get_slice("mean")[row, int(mirrored)], shard.get_slice("log_variance")[
            row, int(mirrored)
        ]

    def normalisation(self, scale: float | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """What is taken from latents, and what they are then divided by, (C, 1, 1) each: statistics, or a factor."""
        if scale is not None:
            return np.zeros((self.index.channels, 1, 1), np.float32), np.full(
                (self.index.channels, 1, 1), 1 / scale, np.float32
            )
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.index.mean, self.index.std))
        return mean, std

    def catalogue(self, *, captions: bool) -> Catalogue:
        """What the shards say their pictures show."""
        y = np.concatenate([shard.get_tensor("y") for shard in self.shards])
        s = np.concatenate([shard.get_tensor("s") for shard in self.shards])
        told = (
            [text for shard in self.shards for text in json.loads(shard.metadata()["captions"])]
            if captions
            else []
        )
        return Catalogue(y, self.index.names, s, self.index.styles, self.index.groups, tuple(told))


@dataclass(frozen=True, eq=False, kw_only=True)
class Latents(Examples):
    """A `Dataset` of latents: draws from the posterior, less `shift` and over `scale`, float32 (C, 1, 1) each."""

    moments: Moments
    shift: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    @property
    def size(self) -> tuple[int, int]:
        return self.moments.index.size

    @property
    def channels(self) -> int:
        return self.moments.index.channels

    def batch(self, index: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Latents `index` (n,), (n, C, h, w); `rng` decides which are mirrored (with `flip`), then draws from the posteriors."""
        mirrored = self.mirrored(len(index), rng)
        moments = [
            self.moments.read(int(row), mirrored=bool(mirror))
            for row, mirror in zip(self.rows[index], mirrored, strict=True)
        ]
        mean, log_variance = (np.stack(part) for part in zip(*moments, strict=True))  # (n, C, h, w) each
        noise = rng.standard_normal(mean.shape, np.float32)
        drawn: npt.NDArray[np.float32] = (
            mean + np.exp(np.float32(0.5) * log_variance) * noise - self.shift
        ) / self.scale
        return drawn

    def resized(self, size: tuple[int, int]) -> Latents:
        """Latents have one size.

        Raises:
            DataError: it is not `size`.
        """
        if size != self.size:
            raise DataError(
                f"{self.moments.folder} holds latents of {self.size[0]}×{self.size[1]}, not {size[0]}×{size[1]}: extract them anew"
            )
        return self


def read_latents(path: Path, *, captions: bool) -> tuple[Moments, Catalogue]:
    """What `python -m model.data latents` left in a folder.

    Raises:
        DataError: the index or a shard is damaged, missing or of another release.
    """
    file = path / INDEX
    try:
        index = Index.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, first['loc'])) or 'index'}: {first['msg']}") from None
    if any(Path(shard.file).name != shard.file for shard in index.shards):
        raise DataError(f"{file} names a shard outside of its folder")
    moments = Moments(path, index)
    return moments, moments.catalogue(captions=captions)


def _open(file: Path) -> Any:  # safetensors has no types for what it returns
    try:
        return safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}; run the extraction again") from None
