"""From clean latents to image files, in a thread beside the denoising one. Both compute with the interpreter lock released."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.bundle import Factor
from ditserve.service.engine.samples import Finished, Preview
from ditserve.service.images import CONTENT_TYPES, encode
from ditserve.service.jobs import Image
from ditserve.service.telemetry import metrics
from ditserve.service.worker.assembly import Made, RunningJob, describe

DECODED_AT_ONCE = 8

Unmade = tuple[RunningJob, Finished]


class Decoder(Protocol):
    """The part of a backend that is used here."""

    def decode(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]: ...


class Finishing:
    """Decodes and encodes, one batch after the other. `pending` batches are waiting or in work. `factors` name the classes."""

    def __init__(self, decoder: Decoder, factors: Sequence[Factor] = ()) -> None:
        self.pending = 0
        self._decoder, self._factors = decoder, factors
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finishing")

    async def images(self, batch: Sequence[Unmade]) -> list[Made]:
        """The images of finished samples, in order."""
        self.pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._images, batch)
        finally:
            self.pending -= 1

    async def preview(self, job: RunningJob, preview: Preview) -> bytes:
        self.pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._preview, job, preview)
        finally:
            self.pending -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _images(self, batch: Sequence[Unmade]) -> list[Made]:
        made: list[Made] = []
        for part in _parts(batch):
            began = time.perf_counter()
            pixels = self._decoder.decode(np.stack([finished.latent for _, finished in part]))
            decode_s = time.perf_counter() - began
            metrics.DECODE_SECONDS.observe(decode_s)
            made += [
                self._encode(job, finished, image, decode_s)
                for (job, finished), image in zip(part, pixels, strict=True)
            ]
        return made

    def _encode(
        self, running: RunningJob, finished: Finished, pixels: npt.NDArray[np.uint8], decode_s: float
    ) -> Made:
        job = running.job
        seed = job.seeds[running.index(finished.id)]
        began = time.perf_counter()
        data = encode(pixels, job.format, metadata=describe(job, finished, seed, self._factors))
        encode_s = time.perf_counter() - began
        metrics.ENCODE_SECONDS.labels(job.format).observe(encode_s)
        metrics.IMAGES.labels(job.format).inc()
        return Made(finished, Image(data, seed, CONTENT_TYPES[job.format]), 1e3 * decode_s, 1e3 * encode_s)

    def _preview(self, job: RunningJob, preview: Preview) -> bytes:
        return encode(self._decoder.decode(preview.latent[None])[0], job.job.format, metadata={})


def _parts(batch: Sequence[Unmade]) -> Iterator[Sequence[Unmade]]:
    """What is decoded together: in order, of one size, and not too many."""
    for _, group in groupby(batch, key=lambda each: each[1].latent.shape):
        alike = list(group)
        for start in range(0, len(alike), DECODED_AT_ONCE):
            yield alike[start : start + DECODED_AT_ONCE]
