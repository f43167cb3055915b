"""The sets of pictures an evaluation compares: real ones, and those a model makes for their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ditserve.model.data.dataset import DataConfig, Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.features import FeatureNetwork, Features
from ditserve.model.nets.autoencoder import Autoencoder
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.spec.diffusion import grid
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.loaded_model import LoadedModel

CHUNK = 32  # pictures made or read at once
TRAINING, GENERATED = "training", "generated"
UNSEEN, REAL_UNSEEN = "generated, unseen labels", "real, unseen labels"


@dataclass(frozen=True, slots=True)
class Set:
    """Pictures (N, 3, H, W) in [−1, 1] on one side of a comparison, the labels (N, F) they should show, and their features."""

    images: Tensor
    labels: Tensor
    features: Features

    def part(self, index: Tensor) -> Set:
        """Some of them."""
        detail = self.features.detail
        features = Features(
            self.features.pooled[index],
            None if detail is None else detail[index],
            self.features.probabilities[index],
        )
        return Set(self.images[index], self.labels[index], features)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which pictures are made, and how.

    `limit` pictures at most for labels of the training set, `per_pair` of each combination of labels; `reference` real pictures
    at most of each kind to compare with.
    """

    limit: int
    per_pair: int
    reference: int

    steps: int
    solver: str
    grid: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    seed: int


def open_data(opened: LoadedModel, path: Path) -> Dataset:
    """The data a model was trained on, selected and split as it was then, not mirrored, and of the model's size.

    Raises:
        DataError: it cannot be opened, or its classes are not the model's.
    """
    manifest = opened.manifest
    said: dict[str, Any] = manifest.provenance.get("training", {}).get("data", {})
    if not said:
        said = {"names": manifest.factors[0].classes if manifest.factors else (), "hold_out": 0}
    try:
        dataset = DataConfig.model_validate({**said, "path": path, "flip": False}).open()
    except ValidationError as error:
        raise DataError(
            f"the model does not tell which data it was trained on: {error.errors()[0]['msg']}"
        ) from None
    if tuple(dataset.factors) != tuple(manifest.factors):
        raise DataError(f"{path} has other classes than the model: pass the data that it was trained on")
    size = opened.network.config.image_size
    return dataset if dataset.size == size else dataset.resized(size)


def asked(dataset: Dataset, plan: Plan) -> tuple[list[int], list[int]]:
    """Which examples' labels to make pictures for: some of training, drawn at random, and all that are met only outside of it."""
    kept = [int(k) for k in dataset.training]
    order = np.random.default_rng(plan.seed).permutation(kept).tolist()
    if not dataset.factors:
        return order[: plan.limit], []
    combinations = [tuple(row) for row in dataset.labels.tolist()]
    trained = {combinations[k]: k for k in order}
    other = {combinations[k]: k for k in unseen(dataset, plan) if combinations[k] not in trained}
    wanted, novel = ([k for k in rows.values() for _ in range(plan.per_pair)] for rows in (trained, other))
    return wanted[: plan.limit], novel


def unseen(dataset: Dataset, plan: Plan) -> list[int]:
    """Examples kept from training, as many as are compared with."""
    return [int(k) for k in np.flatnonzero(dataset.held_out)[: plan.reference]]


@torch.no_grad()
def make(
    opened: LoadedModel, decoder: Autoencoder, dataset: Dataset, rows: Sequence[int], plan: Plan
) -> Iterator[Tensor]:
    """A picture for the labels, and the caption, of each example, in chunks (n, 3, H, W) as a PNG would hold them."""
    manifest, network = opened.manifest, opened.network
    table = step_table(
        plan.solver, grid(plan.grid, plan.steps, manifest.diffusion.timesteps), opened.schedule
    )
    guidance = Guidance(
        plan.guidance_scale, plan.guidance_interval, channels=manifest.diffusion.guidance_channels
    )
    for start in range(0, len(rows), CHUNK):
        index = np.array(rows[start : start + CHUNK])
        text = None if dataset.text is None else torch.from_numpy(dataset.text[index])
        embedding = network.embed(torch.from_numpy(dataset.labels[index]), text)
        denoiser = Denoiser(network, opened.schedule, Conditions((embedding,)), guidance)
        seeds = [plan.seed + start + k for k in range(len(index))]
        *_, x0 = denoise(denoiser, table, seeds, clip_x0=manifest.diffusion.clip_x0)
        yield as_stored(decoder.decode(x0))


def as_stored(images: Tensor) -> Tensor:
    """Pictures in [−1, 1] as eight bits hold them."""
    return (images * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1


def real(dataset: Dataset, decoder: Autoencoder, rows: Sequence[int]) -> Iterator[Tensor]:
    """Examples of the data as pictures, in chunks (n, 3, H, W)."""
    for start in range(0, len(rows), CHUNK):
        batch = dataset.batch(np.array(rows[start : start + CHUNK]), np.random.default_rng(start))
        yield as_stored(decoder.decode(torch.from_numpy(batch)))


def collect(
    opened: LoadedModel, decoder: Autoencoder, dataset: Dataset, network: FeatureNetwork, plan: Plan
) -> dict[str, Set]:
    """The sets to compare, each with its features: TRAINING and GENERATED, and the others where labels were held out."""
    wanted, novel = asked(dataset, plan)
    after = replace(plan, seed=plan.seed + len(wanted))
    every = np.random.default_rng(plan.seed).permutation(dataset.training)[: plan.reference].tolist()
    kept = unseen(dataset, plan)
    sources = {
        TRAINING: (every, real(dataset, decoder, every)),
        REAL_UNSEEN: (kept, real(dataset, decoder, kept)),
        GENERATED: (wanted, make(opened, decoder, dataset, wanted, plan)),
        UNSEEN: (novel, make(opened, decoder, dataset, novel, after)),
    }
    sets = {}
    with Progress(console=Console(stderr=True)) as progress:
        for name, (rows, source) in sources.items():
            task = progress.add_task(name, total=len(rows))
            chunks = []
            for chunk in source:
                chunks.append(chunk)
                progress.advance(task, len(chunk))
            if chunks:
                images, labels = torch.cat(chunks), torch.from_numpy(dataset.labels[rows])
                sets[name] = Set(images, labels, network.features(images))
    return sets
