"""Training examples: labelled pictures as batches, in an order that depends only on (seed, step)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from ditserve.model.data.fingerprint import fingerprint
from ditserve.model.data.texts import Texts
from ditserve.model.data.transforms import centre_crop
from ditserve.model.nets.text import TextError
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.sizes import FirstAxis, Size


class DataError(ModelError):
    """Data that cannot be trained on; the message is one sentence naming the file or field."""


class Images(Protocol):
    """Pictures by index, each uint8 (H, W, 3), of one size or of many; or clips, each (F, H, W, 3).

    They are an array, a mapped file, or files that are decoded on request.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> npt.NDArray[np.uint8]: ...


@runtime_checkable
class EncodedImages(Images, Protocol):
    """Pictures that are decoded on request, and whose bytes are compared more cheaply than their pixels."""

    def checksum(self, index: int) -> int: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """N labelled examples: the part of a `Dataset` that pictures and latents share.

    `rows` int64 (N,) are the indices of the examples in their source. `labels` int64 (N, F) has one column
    per factor. `held_out` bool (N,) marks the examples kept from training. `captions` has N sentences, or
    none. `skipped` names what could not be read, `left_out` counts what is not used. `first_axis` and `fps`
    are those of clips and volumes, see `DataCard`.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    factors: tuple[Factor, ...]
    held_out: npt.NDArray[np.bool_]
    captions: tuple[str, ...] = ()
    encoder: str | None = None
    text_tokens: int = 0
    flip: bool = False
    licence: str | None = None
    attribution: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    first_axis: FirstAxis | None = None
    fps: float | None = None

    @property
    def training(self) -> npt.NDArray[np.int64]:
        """Indices of the examples that may be trained on."""
        return np.flatnonzero(~self.held_out)

    def part(self, index: npt.NDArray[np.int64]) -> Self:
        """Return the examples at `index` (n,)."""
        return replace(
            self,
            rows=self.rows[index],
            labels=self.labels[index],
            held_out=self.held_out[index],
            captions=tuple(self.captions[k] for k in index) if self.captions else (),
        )

    @cached_property
    def texts(self) -> Texts | None:
        """The captions, encoded; None without an encoder. It is opened when this is first read.

        Raises:
            DataError: the encoder cannot be opened.
        """
        if self.encoder is None:
            return None
        try:
            return Texts(self.captions, self.encoder, self.text_tokens)
        except TextError as error:
            raise DataError(f"field text: {error}") from None

    def draw_flips(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Choose which of `count` examples are mirrored, bool (count,): half of them with `flip`, else none.

        `rng` is used only with `flip`.
        """
        return rng.random(count) < 0.5 if self.flip else np.zeros(count, bool)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pictures(Examples):
    """A `Dataset` of pixels: `images` are read when needed, then cropped and resampled to `size` (H, W).

    That of clips is (F, H, W), with their own number of frames.
    """

    images: Images
    size: Size

    @property
    def channels(self) -> int:
        return 3

    def fingerprint(self) -> dict[str, str]:
        """Return checksums of the pictures, see `model.data.fingerprint`."""
        return fingerprint(self._checksum, self.rows)

    def _checksum(self, row: int) -> int:
        if isinstance(self.images, EncodedImages):
            return self.images.checksum(row)
        return zlib.crc32(np.ascontiguousarray(self.images[row]).data)

    def batch(self, index: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Return pictures `index` (n,) in [−1, 1], float32 (n, 3, H, W), or clips (n, 3, F, H, W).

        With `flip`, `rng` decides which are mirrored.

        Raises:
            DataError: a picture cannot be read.
        """
        pixels = np.stack([centre_crop(self.images[int(row)], self.size) for row in self.rows[index]])
        flips = self.draw_flips(len(index), rng)
        pixels[flips] = pixels[flips][..., ::-1, :]
        return to_model_space(pixels)

    def resized(self, size: Size) -> Pictures:
        """Return the same pictures, cropped and resampled to `size`."""
        return replace(self, size=size)


def to_model_space(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return pixels uint8 (n, H, W, 3) as float32 (n, 3, H, W) in [−1, 1], those of clips likewise."""
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 1)).astype(np.float32)
    planes /= np.float32(127.5)
    planes -= np.float32(1)
    return planes


def batch_indices(count: int, batch: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the positions (batch,) in 0..count of the examples of global step `step`.

    Batches are consecutive pieces of one permutation per epoch: with 5 examples and batches of 2, step 2
    takes the last of the first epoch and the first of the second. The result is a function of the arguments
    alone, so a resumed run continues exactly where it stopped.
    """
    pieces: list[npt.NDArray[np.int64]] = []
    start, needed = step * batch, batch
    while needed:
        epoch, offset = divmod(start, count)
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
        piece = order[offset : offset + needed]
        pieces.append(piece)
        start, needed = start + len(piece), needed - len(piece)
    return np.concatenate(pieces)
