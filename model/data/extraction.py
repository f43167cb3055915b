"""`python -m model.data latents`: encode a set of pictures once, so that training need not.

Shard k holds the pictures k·n … (k+1)·n of the source, whoever makes it: any number of workers and machines share the work, and a
shard that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ditserve.model.data.card import card_file
from ditserve.model.data.examples import DataError
from ditserve.model.data.labels import check
from ditserve.model.data.latent_shards import Extraction, Made, finished, make, open_vae, shrinkage
from ditserve.model.data.latents import INDEX, Index, Moments, Shard
from ditserve.model.data.sources import common_size, read_source
from ditserve.model.nets.autoencoder import fingerprint
from ditserve.model.spec.bundle import write_atomic


def plan(
    source: Path,
    autoencoder: Path,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    shard: int = 256,
    batch: int = 16,
    device: str = "cpu",
    threads: int = 0,
) -> Extraction:
    """An extraction, checked before any work is done. Without `size`, pictures must have one already.

    Raises:
        DataError: the source cannot be read, holds latents already, or has pictures of a size that the autoencoder cannot take.
        AutoencoderError: the autoencoder cannot be opened.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("there is no CUDA device here: leave --device out")
    found = read_source(source, captions=True, check="header" if size is None else None)
    if isinstance(found.data, Moments):
        raise DataError(f"{source} holds latents already")
    check(found.catalogue, source)
    height, width = size or common_size(found)
    factor = shrinkage(open_vae(autoencoder))
    if height % factor or width % factor:
        raise DataError(
            f"{source}: {height}×{width} does not divide by {factor}, as {autoencoder} needs: choose a size"
        )
    count = len(found.data) + len(found.broken)
    facts = [
        count,
        found.catalogue.names,
        found.catalogue.styles,
        (height, width),
        shard,
        fingerprint(autoencoder),
    ]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Extraction(
        source, autoencoder, out, (height, width), count, shard, batch, device, threads, identity
    )


def progress_of(job: Extraction, numbers: Sequence[int]) -> tuple[list[Made], list[int]]:
    """Which of the shards are there, and the numbers of those that are not.

    Raises:
        DataError: one is there of another extraction.
    """
    found = {number: finished(job, number) for number in numbers}
    return [made for made in found.values() if made], [number for number, made in found.items() if not made]


def extract(job: Extraction, numbers: Sequence[int], *, workers: int = 1) -> Iterator[Made]:
    """Make shards, yielding each when it is finished, in any order; several workers are processes of their own.

    Raises:
        DataError, AutoencoderError, OSError: as `latent_shards.make`.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        yield from (make(job, number) for number in numbers)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(make, job, number) for number in numbers]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_index(job: Extraction) -> Index | None:
    """Write the index and the data's card once every shard is there; None before.

    Raises:
        DataError: no picture could be read.
    """
    made = [shard for number in job.shards if (shard := finished(job, number))]
    count = sum(shard.count for shard in made)
    if len(made) < len(job.shards):
        return None
    if not count:
        raise DataError(f"{job.source} holds no readable picture: {made[0].skipped[0]}")
    total = squares = np.zeros(())
    for number in job.shards:
        with safe_open(job.file(number), framework="np") as shard:
            total, squares = total + shard.get_tensor("total"), squares + shard.get_tensor("total_squares")
            _, _, channels, height, width = shard.get_slice("mean").get_shape()
    mean = total / (count * 2 * height * width)
    variance = squares / (count * 2 * height * width) - mean**2
    source = read_source(job.source, check=None)
    index = Index(
        autoencoder=fingerprint(job.autoencoder),
        picture_size=job.size,
        size=(height, width),
        channels=channels,
        names=source.catalogue.names,
        styles=source.catalogue.styles,
        groups=source.catalogue.groups,
        shards=tuple(Shard(file=job.file(k).name, count=shard.count) for k, shard in enumerate(made)),
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(variance, 1e-12)).tolist()),
        skipped=tuple(name for shard in made for name in shard.skipped),
    )
    write_atomic(card_file(job.out), source.card.model_dump_json(indent=1).encode())
    write_atomic(job.out / INDEX, index.model_dump_json(indent=1).encode())
    return index
