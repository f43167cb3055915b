"""From clean latents to files, and from pictures to latents, in a thread beside the engine's.

Both threads compute with the interpreter lock released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from math import prod
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.source import SourceLatent
from ditserve.service.backends import NO_ENCODER
from ditserve.service.engine.samples import Finished, Preview
from ditserve.service.errors import InvalidRequest
from ditserve.service.formats import CONTENT_TYPES, MediaKind
from ditserve.service.jobs import Image
from ditserve.service.source_picture import REPAINTED, SourcePicture, decode
from ditserve.service.telemetry import metrics
from ditserve.service.worker.media import encode_media, encode_preview, shown_part
from ditserve.service.worker.running_job import EncodedImage, RunningJob, describe

DECODED_AT_ONCE = 8  # pictures

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
FinishedSample = tuple[RunningJob, Finished]


class Decoder(Protocol):
    """The part of a backend that is used here."""

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]: ...


class PictureEncoder(Protocol):
    """The part of a backend that makes latents of pictures."""

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats: ...


class Postprocessor:
    """The thread that decodes and encodes, one batch after the other.

    `pending` counts the batches and previews that wait or are worked on. `factors` name the classes in the
    metadata of the files, and `unguided_scale` is that of the model's `DiffusionSpec`. The model makes media
    of this `kind`. `further` decodes what a further backbone of that name finished; others are decoded by
    `decoder`. `previews` decodes previews; None: `decoder` does. `encoder` makes latents of pictures.
    """

    def __init__(
        self,
        decoder: Decoder,
        factors: Sequence[Factor] = (),
        *,
        kind: MediaKind = "picture",
        unguided_scale: float = 1.0,
        further: Mapping[str, Decoder] | None = None,
        previews: Decoder | None = None,
        encoder: PictureEncoder | None = None,
    ) -> None:
        self.pending = 0
        self._kind = kind
        self._encoder = encoder
        self._decoder, self._factors, self._unguided_scale = decoder, factors, unguided_scale
        self._further = further or {}
        self._previews = previews or decoder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="postprocess")

    async def images(self, batch: Sequence[FinishedSample]) -> list[EncodedImage]:
        """Return the images of finished samples, in their order."""
        return await self._in_thread(lambda: self._images(batch))

    async def preview(self, job: RunningJob, preview: Preview) -> bytes:
        """Return the file of a preview."""
        return await self._in_thread(lambda: self._preview(job, preview))

    async def source(self, picture: SourcePicture) -> SourceLatent[Floats]:
        """Return the latent of the picture that a request starts from.

        Raises:
            InvalidRequest: the bundle has no encoder.
        """
        return await self._in_thread(lambda: self._source(picture))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        self.pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self.pending -= 1

    def _images(self, batch: Sequence[FinishedSample]) -> list[EncodedImage]:
        images: list[EncodedImage] = []
        for backbone, samples in _decode_batches(batch):
            decoder = self._further.get(backbone, self._decoder)
            began = time.perf_counter()
            pixels = decoder.decode(np.stack([finished.latent for _, finished in samples]))
            decode_s = time.perf_counter() - began
            metrics.DECODE_SECONDS.observe(decode_s)
            images += [
                self._encode(job, finished, picture, decode_s)
                for (job, finished), picture in zip(samples, pixels, strict=True)
            ]
        return images

    def _encode(
        self, running: RunningJob, finished: Finished, pixels: npt.NDArray[np.uint8], decode_s: float
    ) -> EncodedImage:
        job = running.job
        seed = job.seeds[running.index(finished.id)]
        began = time.perf_counter()
        if job.source is not None and finished.latent.shape[1:] != pixels.shape[:-1]:
            pixels = _keep_pixels(pixels, job.source)
        metadata = describe(job, finished, seed, self._factors, unguided_scale=self._unguided_scale)
        data = encode_media(pixels, self._kind, job.format, fps=job.fps, metadata=metadata)
        encode_s = time.perf_counter() - began
        metrics.ENCODE_SECONDS.labels(job.format).observe(encode_s)
        metrics.IMAGES.labels(job.format).inc()
        requested = running.requests[running.index(finished.id)].requested
        # Without a measured ladder both are zero.
        if requested.quality or finished.rung.quality:
            metrics.DELIVERED_QUALITY.labels("asked").observe(requested.quality)
            metrics.DELIVERED_QUALITY.labels("drawn").observe(finished.rung.quality)
        image = Image(data, seed, CONTENT_TYPES[job.format])
        return EncodedImage(finished, image, decode_ms=1e3 * decode_s, encode_ms=1e3 * encode_s)

    def _source(self, picture: SourcePicture) -> SourceLatent[Floats]:
        if self._encoder is None:
            raise InvalidRequest(NO_ENCODER)
        (latent,) = self._encoder.encode(decode(picture.image)[None])
        if picture.mask is None:
            return SourceLatent(latent)
        return SourceLatent(latent, latent_mask(decode(picture.mask), latent.shape[1]))

    def _preview(self, job: RunningJob, preview: Preview) -> bytes:
        latent = shown_part(preview.latent, self._kind)
        return encode_preview(self._previews.decode(latent[None])[0], self._kind, job.job.format)


def warm_decoder(decoder: Decoder, shape: tuple[int, ...]) -> None:
    """Decode as many blank latents (C, H, W) at once as in service, so that the memory for it is taken.

    Raises:
        MemoryError: there is too little.
    """
    decoder.decode(np.zeros((_at_once(shape), *shape), np.float32))


def latent_mask(mask: npt.NDArray[np.uint8], rows: int) -> Floats:
    """Return the mask (1, h, w) in 0..1 of a latent of `rows` rows, from that of pixels (H, W) in 0..255.

    A latent is repainted as much as any pixel that it covers.
    """
    height, width = mask.shape
    factor = height // rows
    covered = mask.reshape(1, rows, factor, width // factor, factor).max(axis=(2, 4))
    shares: Floats = covered.astype(np.float32) / np.float32(REPAINTED)
    return shares


def _keep_pixels(pixels: npt.NDArray[np.uint8], source: SourcePicture) -> npt.NDArray[np.uint8]:
    """Return decoded pixels (H, W, 3) with those of the source put back where its mask keeps them.

    Of a clip (F, H, W, 3) that is the first frame. An autoencoder does not give back what was encoded.
    """
    if pixels.ndim == 4:
        return np.concatenate([decode(source.image)[None], pixels[1:]])
    if source.mask is None:
        return pixels
    mask, kept = decode(source.mask)[..., None].astype(np.uint32), decode(source.image).astype(np.uint32)
    blended = mask * pixels + (REPAINTED - mask) * kept
    return ((blended + REPAINTED // 2) // REPAINTED).astype(np.uint8)


def _decode_batches(batch: Sequence[FinishedSample]) -> Iterator[tuple[str, Sequence[FinishedSample]]]:
    """Yield the backbone that finished samples, and those to decode together.

    They are in order, of one size, and at most `_at_once`.
    """
    for (shape, backbone), group in groupby(batch, key=_decoded_alike):
        alike, at_once = list(group), _at_once(shape)
        for start in range(0, len(alike), at_once):
            yield backbone, alike[start : start + at_once]


def _at_once(shape: tuple[int, ...]) -> int:
    """Return how many latents (C, …, h, w) are decoded together: a clip counts as its pictures."""
    return max(1, DECODED_AT_ONCE // prod(shape[1:-2]))


def _decoded_alike(sample: FinishedSample) -> tuple[tuple[int, ...], str]:
    _, finished = sample
    return finished.latent.shape, finished.rung.last_backbone
