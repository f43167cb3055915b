"""`python -m model.data latents`: encode a set of pictures once, so that training need not.

Shard k holds the pictures k·n … (k+1)·n of the source, whichever process makes it. So any number of worker
processes and machines can share the work, and a shard that exists is not made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ditserve.model.data.examples import DataError, to_model_space
from ditserve.model.data.labels import check_labels
from ditserve.model.data.latents import INDEX, LatentIndex, LatentShard, Moments
from ditserve.model.data.sources import card_file, common_size, read_source
from ditserve.model.data.transforms import centre_crop
from ditserve.model.nets.autoencoder import (
    autoencoder_kind,
    encoder_fingerprint,
    fingerprint,
    open_latent_autoencoder,
)
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.output_folder import LATENTS, claim
from ditserve.model.spec.sizes import Size, frame_by_frame, size_name


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """The settings of a worker: pictures in a `shard`, pictures encoded at once, device, and threads.

    With `threads` 0 PyTorch chooses their number.
    """

    shard: int = 256
    batch: int = 16
    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Extraction:
    """An extraction job, the same for every worker: encode `count` pictures, cropped to `size` (H, W).

    That of clips is (F, H, W).
    `identity` is a hash of the pictures' labels, the shard size and the autoencoder; every shard carries it.
    """

    source: Path
    autoencoder: Path
    out: Path
    size: Size
    count: int
    settings: EncoderSettings
    identity: str

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-self.count // self.settings.shard))

    def rows(self, number: int) -> range:
        """Return the indices of the source's pictures that shard `number` holds."""
        shard = self.settings.shard
        return range(number * shard, min((number + 1) * shard, self.count))

    def file(self, number: int) -> Path:
        return self.out / f"{number:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """The number of pictures in a finished shard, and messages about those that could not be read."""

    count: int
    skipped: tuple[str, ...]


def plan_extraction(
    source: Path,
    autoencoder: Path,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    settings: EncoderSettings = EncoderSettings(),
) -> Extraction:
    """Return an extraction that is checked before any work is done.

    Without `size` (H, W), all pictures must have one size already. Clips are encoded frame by frame.

    Raises:
        DataError: the source cannot be read, holds latents, or has a size that the autoencoder cannot take.
        AutoencoderError: the autoencoder cannot be opened.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise DataError("there is no CUDA device here: leave --device out")
    pictures = read_source(source, captions=True, check="header" if size is None else None)
    if isinstance(pictures.data, Moments):
        raise DataError(f"{source} holds latents already")
    check_labels(pictures.catalogue, source)
    whole = common_size(pictures) if size is None else (*pictures.first_sides, *size)
    factor = open_latent_autoencoder(autoencoder).factor
    if any(side % factor for side in whole[-2:]):
        raise DataError(
            f"{source}: {size_name(whole[-2:], '×')} does not divide by {factor}, as {autoencoder} needs: "
            "choose a size"
        )
    count = len(pictures.data) + len(pictures.broken)
    labels = pictures.catalogue
    facts = [count, labels.names, labels.styles, whole, settings.shard, fingerprint(autoencoder)]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Extraction(source, autoencoder, out, whole, count, settings, identity)


def progress_of(job: Extraction, numbers: Sequence[int]) -> tuple[list[FinishedShard], list[int]]:
    """Return those of the shards that are finished, and the numbers of the others.

    Raises:
        DataError: a shard belongs to another extraction.
    """
    shards = {number: finished_shard(job, number) for number in numbers}
    missing = [number for number, shard in shards.items() if not shard]
    return [shard for shard in shards.values() if shard], missing


def finished_shard(job: Extraction, number: int) -> FinishedShard | None:
    """Return shard `number`, or None if it is missing or damaged.

    Raises:
        DataError: it belongs to another extraction.
    """
    file = job.file(number)
    try:
        with safe_open(file, framework="np") as shard:
            metadata = shard.metadata() or {}
            count = shard.get_slice("y").get_shape()[0]
    except (OSError, SafetensorError):
        return None
    if metadata.get("identity") != job.identity:
        raise DataError(f"{file} was made of other pictures or with other settings: choose an empty folder")
    return FinishedShard(count, tuple(json.loads(metadata["skipped"])))


def extract(job: Extraction, numbers: Sequence[int], *, workers: int = 1) -> Iterator[FinishedShard]:
    """Make the shards `numbers`, and yield each when it is finished, in any order.

    One worker runs in this process; more are processes of their own.

    Raises:
        OutputError: the folder is none for latents, or overlaps an input.
        DataError, AutoencoderError, OSError: as `make_shard`.
    """
    # Shared: other processes make other parts in the same folder.
    with claim(job.out, LATENTS, apart=(job.source, job.autoencoder), shared=True):
        yield from _make_shards(job, numbers, workers)


def _make_shards(job: Extraction, numbers: Sequence[int], workers: int) -> Iterator[FinishedShard]:
    if workers == 1:
        yield from (make_shard(job, number) for number in numbers)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(make_shard, job, number) for number in numbers]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_shard(job: Extraction, number: int) -> FinishedShard:
    """Encode the pictures of a shard and write it, whole or not at all.

    Raises:
        DataError, AutoencoderError, OSError: the source or the autoencoder is gone, or the disk is full.
    """
    return _worker(job).make(number)


@cache
def _worker(job: Extraction) -> EncoderWorker:
    return EncoderWorker(job)


class EncoderWorker:
    """The pictures and the autoencoder of an extraction, opened once in each process."""

    def __init__(self, job: Extraction) -> None:
        self.job = job
        if job.settings.threads:
            torch.set_num_threads(job.settings.threads)
        source = read_source(job.source, captions=True, check=None)
        if isinstance(source.data, Moments):
            raise DataError(f"{job.source} holds latents already")
        self.images, self.catalogue = source.data, source.catalogue
        self.vae = open_latent_autoencoder(job.autoencoder, device=job.settings.device)

    def make(self, number: int) -> FinishedShard:
        """Encode and write shard `number`."""
        kept: list[int] = []
        skipped: list[str] = []
        pixels: list[npt.NDArray[np.uint8]] = []
        for row in self.job.rows(number):
            try:
                pixels.append(centre_crop(self.images[row], self.job.size))
                kept.append(row)
            except DataError as error:
                skipped.append(str(error))
        mean, log_variance = self.moments(pixels)
        others = tuple(axis for axis in range(mean.ndim) if axis != 2)  # all but the channels
        captions = [self.catalogue.captions[row] if self.catalogue.captions else "" for row in kept]
        tensors = {
            "mean": mean,
            "log_variance": log_variance,
            "y": self.catalogue.y[kept],
            "s": self.catalogue.s[kept],
            "total": mean.sum(others, np.float64),
            "total_squares": (mean.astype(np.float64) ** 2 + np.exp(log_variance)).sum(others),
        }
        metadata = {
            "identity": self.job.identity,
            "captions": json.dumps(captions),
            "skipped": json.dumps(skipped),
        }
        write_atomic(self.job.file(number), save(tensors, metadata))
        return FinishedShard(len(kept), tuple(skipped))

    def moments(
        self, pixels: list[npt.NDArray[np.uint8]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return mean and log-variance, float32 (n, 2, C, …, h, w) each: pictures and their mirror images."""
        settings, (*first, height, width) = self.job.settings, self.job.size
        shape = (2, self.vae.channels, *first, height // self.vae.factor, width // self.vae.factor)
        moments = np.zeros((2, len(pixels), *shape), np.float32)
        for start in range(0, len(pixels), settings.batch):
            planes = to_model_space(np.stack(pixels[start : start + settings.batch]))
            x = torch.from_numpy(planes).to(settings.device)  # (b, 3, …, H, W)
            for mirrored, view in enumerate((x, x.flip(-1))):
                with torch.inference_mode():
                    encoded = frame_by_frame(self._moments, view).chunk(2, 1)
                for target, moment in zip(moments, encoded, strict=True):
                    target[start : start + len(x), mirrored] = moment.float().cpu().numpy()
        return moments[0], moments[1]

    def _moments(self, images: Tensor) -> Tensor:
        return torch.cat(self.vae.moments(images), 1)


def write_index(job: Extraction) -> LatentIndex | None:
    """Write the index and the data's card if every shard is finished; else return None.

    Raises:
        DataError: no picture could be read.
    """
    shards = [shard for number in job.shards if (shard := finished_shard(job, number))]
    count = sum(shard.count for shard in shards)
    if len(shards) < len(job.shards):
        return None
    if not count:
        raise DataError(f"{job.source} holds no readable picture: {shards[0].skipped[0]}")
    total = squares = np.zeros(())
    for number in job.shards:
        with safe_open(job.file(number), framework="np") as tensors:
            total = total + tensors.get_tensor("total")
            squares = squares + tensors.get_tensor("total_squares")
            _, _, channels, *size = tensors.get_slice("mean").get_shape()
    values = count * 2 * math.prod(size)
    mean = total / values
    variance = squares / values - mean**2
    source = read_source(job.source, check=None)
    index = LatentIndex(
        autoencoder=encoder_fingerprint(job.autoencoder),
        decoder=autoencoder_kind(job.autoencoder),
        picture_size=job.size,
        size=tuple(size),
        channels=channels,
        names=source.catalogue.names,
        styles=source.catalogue.styles,
        groups=source.catalogue.groups,
        shards=tuple(LatentShard(file=job.file(k).name, count=shard.count) for k, shard in enumerate(shards)),
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(variance, 1e-12)).tolist()),
        skipped=tuple(message for shard in shards for message in shard.skipped),
    )
    write_atomic(card_file(job.out), source.card.model_dump_json(indent=1).encode())
    write_atomic(job.out / INDEX, index.model_dump_json(indent=1).encode())
    return index
