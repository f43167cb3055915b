"""From clean latents to image files, in a thread beside the engine's.

Both compute with the interpreter lock released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.manifest import Factor
from ditserve.service.engine.samples import Finished, Preview
from ditserve.service.images import CONTENT_TYPES, encode
from ditserve.service.jobs import Image
from ditserve.service.telemetry import metrics
from ditserve.service.worker.running_job import EncodedImage, RunningJob, describe

DECODED_AT_ONCE = 8

T = TypeVar("T")
FinishedSample = tuple[RunningJob, Finished]


class Decoder(Protocol):
    """The part of a backend that is used here."""

    def decode(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]: ...


class Postprocessor:
    """The thread that decodes and encodes, one batch after the other.

    `pending` counts the batches and previews that wait or are worked on. `factors` name the classes in the
    metadata of the files, and `unguided_scale` is that of the model's `DiffusionSpec`. `previews` decodes
    previews; None: `decoder` does.
    """

    def __init__(
        self,
        decoder: Decoder,
        factors: Sequence[Factor] = (),
        *,
        unguided_scale: float = 1.0,
        previews: Decoder | None = None,
    ) -> None:
        self.pending = 0
        self._decoder, self._factors, self._unguided_scale = decoder, factors, unguided_scale
        self._previews = previews or decoder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="postprocess")

    async def images(self, batch: Sequence[FinishedSample]) -> list[EncodedImage]:
        """Return the images of finished samples, in their order."""
        return await self._in_thread(lambda: self._images(batch))

    async def preview(self, job: RunningJob, preview: Preview) -> bytes:
        """Return the file of a preview."""
        return await self._in_thread(lambda: self._preview(job, preview))

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
        for samples in _decode_batches(batch):
            began = time.perf_counter()
            pixels = self._decoder.decode(np.stack([finished.latent for _, finished in samples]))
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
        metadata = describe(job, finished, seed, self._factors, unguided_scale=self._unguided_scale)
        data = encode(pixels, job.format, metadata=metadata)
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

    def _preview(self, job: RunningJob, preview: Preview) -> bytes:
        return encode(self._previews.decode(preview.latent[None])[0], job.job.format, metadata={})


def _decode_batches(batch: Sequence[FinishedSample]) -> Iterator[Sequence[FinishedSample]]:
    """Yield the samples to decode together: in order, of one size, at most `DECODED_AT_ONCE`."""
    for _, group in groupby(batch, key=lambda sample: sample[1].latent.shape):
        same_size = list(group)
        for start in range(0, len(same_size), DECODED_AT_ONCE):
            yield same_size[start : start + DECODED_AT_ONCE]
