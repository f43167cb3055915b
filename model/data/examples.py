"""Labelled pictures for training, in an order that depends only on (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ditserve.model.data.crop import centre_crop
from ditserve.model.nets.text import TextError, open_encoder
from ditserve.model.spec.bundle import Factor
from ditserve.model.spec.errors import ModelError


class DataError(ModelError):
    """Data that cannot be trained on; the message is one sentence naming the file or field."""


class Images(Protocol):
    """Pictures by number, each uint8 (H, W, 3), of one size or of many: an array, a mapped file, or files decoded when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """N labelled examples of whatever kind.

    `labels` int64 (N, F) has one column per factor; `held_out` bool (N,) are kept from training; `rows` int64 (N,) tells which of
    the source's examples these are. `captions` has N sentences, or none. `skipped` names what could not be read.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    factors: tuple[Factor, ...]
    held_out: npt.NDArray[np.bool_]
    captions: tuple[str, ...] = ()
    encoder: str | None = None
    flip: bool = False
    licence: str | None = None
    attribution: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def training(self) -> npt.NDArray[np.int64]:
        """Indices of the examples that may be trained on."""
        return np.flatnonzero(~self.held_out)

    @cached_property
    def text(self) -> npt.NDArray[np.float32] | None:
        """Embeddings of the captions, (N, text_size); None where none are asked for. Each different caption is encoded once.

        Raises:
            DataError: the encoder cannot be opened.
        """
        if self.encoder is None:
            return None
        different, place = np.unique(np.array(self.captions), return_inverse=True)
        try:
            return open_encoder(self.encoder).encode([str(caption) for caption in different])[place]
        except TextError as error:
            raise DataError(f"field text: {error}") from None

    def mirrored(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Which of a batch are mirrored, (count,): half of them with `flip`, and then `rng` is used."""
        return rng.random(count) < 0.5 if self.flip else np.zeros(count, bool)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pictures(Examples):
    """A `Dataset` of pixels: `images` are read when needed, then cropped and resampled to `size` (H, W)."""

    images: Images
    size: tuple[int, int]

    @property
    def channels(self) -> int:
        return 3

    def batch(self, index: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Pictures `index` (n,) in [−1, 1], (n, 3, H, W); with `flip`, `rng` decides which are mirrored.

        Raises:
            DataError: a picture cannot be read.
        """
        pixels = np.stack([centre_crop(self.images[int(row)], self.size) for row in self.rows[index]])
        mirrored = self.mirrored(len(index), rng)
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        return model_space(pixels)

    def resized(self, size: tuple[int, int]) -> Pictures:
        """The same pictures, cropped and resampled to (H, W)."""
        return replace(self, size=size)


def model_space(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 (n, H, W, 3) to [−1, 1], float32 (n, 3, H, W)."""
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    planes /= np.float32(127.5)
    planes -= np.float32(1)
    return planes


def batch_indices(count: int, batch: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """Positions (batch,) in 0..count of global step `step`: consecutive pieces of one permutation per epoch.

    A function of its arguments alone, so a resumed run continues exactly where it stopped.
    """
    out: list[npt.NDArray[np.int64]] = []
    start, needed = step * batch, batch
    while needed:
        epoch, offset = divmod(start, count)
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
        piece = order[offset : offset + needed]
        out.append(piece)
        start, needed = start + len(piece), needed - len(piece)
    return np.concatenate(out)
