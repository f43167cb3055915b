"""Latents prepared for training: an autoencoder's moments in safetensors shards, with an index.

    <folder>/latents.json       `LatentIndex`: sizes, class names, statistics, shards
    <folder>/00000.safetensors  `mean`, `log_variance`: float32 (n, 2, C, h, w), as drawn and mirrored;
                                of clips (n, 2, C, F, h, w)
                                `y`, `s`: int64 (n,)
                                `total`, `total_squares`: float64 (C,), expected sums over draws
                                metadata: captions and skipped pictures, as JSON

The shards keep the moments rather than draws from them: each training step draws anew, as encoding
on the fly would.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from ditserve.model.data.examples import DataError, Examples
from ditserve.model.data.fingerprint import fingerprint
from ditserve.model.data.labels import Catalogue, LeftOut
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.manifest import DecoderKind
from ditserve.model.spec.sizes import Size, size_name

INDEX = "latents.json"


class LatentShard(BaseModel):
    """One safetensors file and the number of pictures in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    count: int


class LatentIndex(BaseModel):
    """The content of latents.json.

    `mean` and `std` have a value for each channel, over draws from the posteriors of the whole
    set, mirrored copies included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    autoencoder: str
    """sha256 of its weights."""
    decoder: DecoderKind = "sd-vae"
    """The kind of autoencoder."""
    picture_size: Size
    size: Size
    channels: int
    names: tuple[str, ...]
    styles: tuple[str, ...]
    groups: tuple[str, ...]
    shards: tuple[LatentShard, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()
    """Pictures that could not be read when the latents were made."""


class Moments:
    """Means and log-variances of all pictures, read from the mapped shards on request.

    Raises:
        DataError: a shard cannot be read, or does not hold what the index says.
    """

    def __init__(self, folder: Path, index: LatentIndex) -> None:
        self.folder, self.index = folder, index
        self.shards = [_open(folder / shard.file) for shard in index.shards]
        self.ends = np.cumsum([shard.count for shard in index.shards])
        for shard, opened in zip(index.shards, self.shards, strict=True):
            shape = [shard.count, 2, index.channels, *index.size]
            if any(list(opened.get_slice(name).get_shape()) != shape for name in ("mean", "log_variance")):
                raise DataError(f"{folder / shard.file} does not hold the {shape} moments that {INDEX} says")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int, *, mirrored: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return mean and log-variance of a picture, both (C, h, w); of a clip (C, F, h, w)."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[number - 1]) if number else 0)
        mean, log_variance = (self.shards[number].get_slice(name) for name in ("mean", "log_variance"))
        return mean[row, int(mirrored)], log_variance[row, int(mirrored)]

    def normalisation(self, scale: float | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return (shift, scale), float32 (C, 1, 1) each: normalised latents are (latents − shift) / scale.

        Those of clips are (C, 1, 1, 1).

        Without the argument `scale` these are the statistics of the set; with it, latents
        are multiplied by it.
        """
        shape = (self.index.channels, *(1 for _ in self.index.size))
        if scale is not None:
            return np.zeros(shape, np.float32), np.full(shape, 1 / scale, np.float32)
        mean, std = (np.array(each, np.float32).reshape(shape) for each in (self.index.mean, self.index.std))
        return mean, std

    def catalogue(self, *, captions: bool) -> Catalogue:
        """Return the labels of all pictures."""
        y = np.concatenate([shard.get_tensor("y") for shard in self.shards])
        s = np.concatenate([shard.get_tensor("s") for shard in self.shards])
        texts: list[str] = []
        if captions:
            texts = [text for shard in self.shards for text in json.loads(shard.metadata()["captions"])]
        index = self.index
        return Catalogue(y, index.names, s, index.styles, index.groups, tuple(texts))


@dataclass(frozen=True, eq=False, kw_only=True)
class Latents(Examples):
    """A `Dataset` of latents: draws from the posterior, normalised as (latents − `shift`) / `scale`.

    `shift` and `scale` are float32 (C, 1, 1), of clips (C, 1, 1, 1).
    """

    moments: Moments
    shift: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    @property
    def size(self) -> Size:
        return self.moments.index.size

    @property
    def channels(self) -> int:
        return self.moments.index.channels

    def batch(self, index: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Return latents `index` (n,), float32 (n, C, h, w) or, of clips, (n, C, F, h, w).

        `rng` first decides which are mirrored (with `flip`), then draws from the posteriors.
        """
        flips = self.draw_flips(len(index), rng)
        moments = [
            self.moments.read(int(row), mirrored=bool(flip))
            for row, flip in zip(self.rows[index], flips, strict=True)
        ]
        mean, log_variance = (np.stack(part) for part in zip(*moments, strict=True))  # (n, C, …, h, w) each
        noise = rng.standard_normal(mean.shape, np.float32)
        latents = mean + np.exp(np.float32(0.5) * log_variance) * noise
        normalised: npt.NDArray[np.float32] = (latents - self.shift) / self.scale
        return normalised

    def fingerprint(self) -> dict[str, str]:
        """Return checksums of the latents, see `model.data.fingerprint`."""
        return fingerprint(
            lambda row: zlib.crc32(np.ascontiguousarray(self.moments.read(row, mirrored=False)[0]).data),
            self.rows,
        )

    def resized(self, size: Size) -> Latents:
        """Return the same latents: they have one size.

        Raises:
            DataError: it is not `size`.
        """
        if size != self.size:
            raise DataError(
                f"{self.moments.folder} holds latents of {size_name(self.size, '×')}, "
                f"not {size_name(size, '×')}: extract them anew"
            )
        return self


def read_latents(path: Path, *, captions: bool) -> tuple[Moments, Catalogue, LeftOut]:
    """Read the latent shards that `python -m model.data latents` wrote to the folder `path`.

    Raises:
        DataError: the index or a shard is damaged, missing or of another release.
    """
    file = path / INDEX
    try:
        index = LatentIndex.model_validate_json(file.read_bytes())
    except ValidationError as error:
        field, message = wrong_field(error)
        raise DataError(f"{file}: {field or 'index'}: {message}") from None
    if any(Path(shard.file).name != shard.file for shard in index.shards):
        raise DataError(f"{file} names a shard outside of its folder")
    moments = Moments(path, index)
    return moments, moments.catalogue(captions=captions), LeftOut()


# Any: safetensors has no types for the open file.
def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}; run the extraction again") from None
