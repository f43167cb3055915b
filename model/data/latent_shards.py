"""One shard of latents at a time: made by a worker, or found finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ditserve.model.data.crop import centre_crop
from ditserve.model.data.examples import DataError, model_space
from ditserve.model.data.latents import Moments
from ditserve.model.data.sources import read_source
from ditserve.model.nets.autoencoder import AutoencoderError, SdVae, open_autoencoder
from ditserve.model.spec.bundle import write_atomic


@dataclass(frozen=True, slots=True)
class Extraction:
    """What to extract, the same for every worker: pictures of `size` (H, W), `shard` of them in a file.

    `identity` is a hash of the pictures' labels, the settings and the autoencoder; every shard carries it. `threads` are a
    worker's, 0 leaves their number to PyTorch.
    """

    source: Path
    autoencoder: Path
    out: Path
    size: tuple[int, int]
    count: int
    shard: int
    batch: int
    device: str
    threads: int
    identity: str

    @property
    def shards(self) -> range:
        return range(-(-self.count // self.shard))

    def rows(self, number: int) -> range:
        """The source's pictures of a shard."""
        return range(number * self.shard, min((number + 1) * self.shard, self.count))

    def file(self, number: int) -> Path:
        return self.out / f"{number:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Made:
    """A finished shard: how many pictures it holds, and which could not be read."""

    count: int
    skipped: tuple[str, ...]


def finished(job: Extraction, number: int) -> Made | None:
    """A shard that is there and whole.

    Raises:
        DataError: it is of another extraction.
    """
    file = job.file(number)
    try:
        with safe_open(file, framework="np") as shard:
            told = shard.metadata() or {}
            count = shard.get_slice("y").get_shape()[0]
    except (OSError, SafetensorError):
        return None
    if told.get("identity") != job.identity:
        raise DataError(f"{file} was made of other pictures or with other settings: choose an empty folder")
    return Made(count, tuple(json.loads(told["skipped"])))


def make(job: Extraction, number: int) -> Made:
    """Encode the pictures of a shard and write it, whole or not at all.

    Raises:
        DataError, AutoencoderError, OSError: the source or the autoencoder are gone, or the disk is full.
    """
    return _worker(job).make(number)


@cache
def _worker(job: Extraction) -> Worker:
    return Worker(job)


class Worker:
    """The pictures and the autoencoder, opened once by each process."""

    def __init__(self, job: Extraction) -> None:
        self.job = job
        if job.threads:
            torch.set_num_threads(job.threads)
        source = read_source(job.source, captions=True, check=None)
        if isinstance(source.data, Moments):
            raise DataError(f"{job.source} holds latents already")
        self.images, self.catalogue = source.data, source.catalogue
        self.vae = open_vae(job.autoencoder).to(job.device)

    def make(self, number: int) -> Made:
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
        captions = [self.catalogue.captions[row] if self.catalogue.captions else "" for row in kept]
        tensors = {
            "mean": mean,
            "log_variance": log_variance,
            "y": self.catalogue.y[kept],
            "s": self.catalogue.s[kept],
            "total": mean.sum((0, 1, 3, 4), np.float64),
            "total_squares": (mean.astype(np.float64) ** 2 + np.exp(log_variance)).sum((0, 1, 3, 4)),
        }
        told = {
            "identity": self.job.identity,
            "captions": json.dumps(captions),
            "skipped": json.dumps(skipped),
        }
        write_atomic(self.job.file(number), save(tensors, told))
        return Made(len(kept), tuple(skipped))

    def moments(
        self, pixels: list[npt.NDArray[np.uint8]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and log-variance, (n, 2, C, h, w) each: as the pictures (H, W, 3) are, and mirrored."""
        factor = shrinkage(self.vae)
        shape = 2, self.vae.config.latent_channels, self.job.size[0] // factor, self.job.size[1] // factor
        out = np.zeros((2, len(pixels), *shape), np.float32)
        for start in range(0, len(pixels), self.job.batch):
            x = torch.from_numpy(model_space(np.stack(pixels[start : start + self.job.batch]))).to(
                self.job.device
            )
            for mirrored, view in enumerate((x, x.flip(-1))):
                with torch.inference_mode():
                    posterior = self.vae.encode(view).latent_dist
                for part, moment in zip(out, (posterior.mean, posterior.logvar), strict=True):
                    part[start : start + len(x), mirrored] = moment.float().cpu().numpy()
        return out[0], out[1]


def open_vae(folder: Path) -> Any:  # a diffusers AutoencoderKL, which has no types
    """The network of a folder's SD-VAE.

    Raises:
        AutoencoderError: it cannot be opened.
    """
    autoencoder = open_autoencoder("sd-vae", folder)
    if not isinstance(autoencoder, SdVae):
        raise AutoencoderError(f"{folder} is not an SD-VAE")
    return autoencoder.vae


def shrinkage(vae: Any) -> int:
    """How many pixels a latent covers on a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))
