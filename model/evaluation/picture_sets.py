"""The picture sets that an evaluation compares: real ones, and those a model generates for their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ditserve.model.data.dataset import DataConfig, Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.data.latents import Latents
from ditserve.model.evaluation.features import FeatureNetwork, Features
from ditserve.model.nets.autoencoder import PictureDecoder
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import Network
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.spec.class_names import same_classes
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.sizes import Size, scaled
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.loaded_model import LoadedModel

CHUNK = 32  # pictures generated or read at once
Given = Literal["all", "labels", "text"]
Wordings = Literal["first", "unseen"]
TRAINING, GENERATED = "training", "generated"
UNSEEN, REAL_UNSEEN = "generated, unseen labels", "real, unseen labels"


@dataclass(frozen=True, slots=True)
class PictureSet:
    """One side of a comparison: pictures (N, 3, H, W) in [−1, 1], their labels (N, F) and their features.

    The labels of generated pictures are those that were asked for.
    """

    images: Tensor
    labels: Tensor
    features: Features

    def part(self, index: Tensor) -> PictureSet:
        """Return the pictures at `index` (n,)."""
        detail = self.features.detail
        features = Features(
            self.features.pooled[index],
            None if detail is None else detail[index],
            self.features.probabilities[index],
        )
        return PictureSet(self.images[index], self.labels[index], features)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """The number of pictures to generate and to compare with, and how to sample.

    `limit` pictures are generated for labels of the training set, but no more than `per_pair` of each
    combination of labels, if it is given. At most `reference` real pictures of each kind are compared with.

    The model is told all that the data tells of an example, its labels alone, or its text alone: its first
    wording, or one that is kept from training.
    """

    limit: int
    per_pair: int | None
    reference: int

    steps: int
    solver: str
    grid: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    seed: int
    given: Given = "all"
    wordings: Wordings = "first"

    @property
    def unseen_wordings(self) -> bool:
        """True if pictures are asked for in words that training never shows."""
        return self.wordings == "unseen"


def picture_size(model: LoadedModel) -> Size:
    """Return the size of a model's pictures, of latents when they are decoded."""
    return scaled(model.network.config.image_size, model.manifest.upscale)


def texts_instead(manifest: Manifest) -> bool:
    """Return whether a model learned texts in place of the first factor's labels, and never both together."""
    return manifest.provenance.get("training", {}).get("text_instead") is not None


def open_data(model: LoadedModel, path: Path, *, pictures: bool = False) -> Dataset:
    """Open the data a model was trained on, not mirrored, and of the model's size.

    It is selected and split as in training. With `pictures`, those that the latents of a model were made of
    will do in their place.

    Raises:
        DataError: the data cannot be opened, its classes are not the model's, or it holds pictures and the
            model denoises latents.
    """
    manifest = model.manifest
    config: dict[str, Any] = manifest.provenance.get("training", {}).get("data", {})
    if not config:
        config = {"names": manifest.factors[0].classes if manifest.factors else (), "hold_out": 0}
    try:
        dataset = DataConfig.model_validate({**config, "path": path, "flip": False}).open()
    except ValidationError as error:
        raise DataError(
            f"the model does not tell which data it was trained on: {wrong_field(error)[1]}"
        ) from None
    if not same_classes(dataset.factors, manifest.factors):
        raise DataError(f"{path} has other classes than the model: pass the data that it was trained on")
    size = model.network.config.image_size
    if manifest.decoder != "identity" and not isinstance(dataset, Latents):
        if not pictures:
            raise DataError(
                f"{path} holds pictures and the model denoises latents: pass those of model.data latents"
            )
        size = picture_size(model)
    return dataset if dataset.size == size else dataset.resized(size)


def choose_examples(dataset: Dataset, plan: EvaluationPlan) -> tuple[list[int], list[int]]:
    """Choose the examples whose labels pictures are generated for, as two lists of indices.

    The first are training examples: one of each combination of labels, in a random order, then others at
    random, so that combinations are as frequent as in training. If there are too few, they are repeated. With
    `per_pair`, each combination is there so many times instead. The second list has, `per_pair` times or
    once, a held-out example of each combination that training never shows.
    """
    training = [int(k) for k in dataset.training if _asked_for(dataset, int(k), plan)]
    order: list[int] = np.random.default_rng(plan.seed).permutation(training).tolist()
    combinations = [tuple(row) for row in dataset.labels.tolist()]
    if not dataset.factors:
        return [order[k % len(order)] for k in range(plan.limit)], []
    trained = {combinations[k]: k for k in order}
    other = {combinations[k]: k for k in held_out_examples(dataset, plan) if combinations[k] not in trained}
    unseen = [k for k in other.values() for _ in range(plan.per_pair or 1)]
    if plan.per_pair is not None:
        return [k for k in trained.values() for _ in range(plan.per_pair)][: plan.limit], unseen
    first = list(trained.values())[: plan.limit]
    return first + [order[k % len(order)] for k in range(plan.limit - len(first))], unseen


def _asked_for(dataset: Dataset, example: int, plan: EvaluationPlan) -> bool:
    """Return False for an example that has no wording to ask for it by."""
    texts = dataset.texts
    return not plan.unseen_wordings or (texts is not None and bool(texts.unseen[example]))


def choose_rows(dataset: Dataset, plan: EvaluationPlan) -> dict[str, list[int]]:
    """Return the examples of every set, by its name; a set without any is left out."""
    seen, unseen = choose_examples(dataset, plan)
    training = np.random.default_rng(plan.seed).permutation(dataset.training)[: plan.reference].tolist()
    rows = {
        TRAINING: training,
        REAL_UNSEEN: held_out_examples(dataset, plan),
        GENERATED: seen,
        UNSEEN: unseen,
    }
    return {name: index for name, index in rows.items() if index}


def held_out_examples(dataset: Dataset, plan: EvaluationPlan) -> list[int]:
    """Return the indices of examples kept from training, at most as many as are compared with."""
    examples = [int(k) for k in np.flatnonzero(dataset.held_out) if _asked_for(dataset, int(k), plan)]
    return examples[: plan.reference]


@torch.no_grad()
def generate(
    model: LoadedModel, decoder: PictureDecoder, dataset: Dataset, rows: Sequence[int], plan: EvaluationPlan
) -> Iterator[Tensor]:
    """Generate a picture for the labels and the caption of each example, in chunks (n, 3, H, W).

    Pixels are in [−1, 1], rounded to eight bits. Picture k has the seed `plan.seed` + k.
    """
    manifest, network = model.manifest, model.network
    levels = noise_levels(plan.grid, plan.steps, model.schedule)
    table = step_table(plan.solver, levels, model.schedule)
    guidance = Guidance(
        plan.guidance_scale, plan.guidance_interval, channels=manifest.diffusion.guidance_channels
    )
    for start in range(0, len(rows), CHUNK):
        index = np.array(rows[start : start + CHUNK])
        embedding = network.embed(*told(dataset, index, network, plan))
        denoiser = Denoiser(network, model.schedule, Conditions((embedding,)), guidance)
        seeds = [plan.seed + start + k for k in range(len(index))]
        *_, x0 = denoise(denoiser, table, seeds, clip_x0=manifest.diffusion.clip_x0)
        yield round_to_8_bits(decoder.decode(x0))


def told(
    dataset: Dataset, index: npt.NDArray[np.int64], network: Network, plan: EvaluationPlan
) -> tuple[Tensor, Tensor | None]:
    """Return the labels (n, F) and the texts (n, width) that a model is told of examples, as `plan` says."""
    labels, text = torch.from_numpy(dataset.labels[index]), None
    if plan.given == "text":
        labels = null_labels(network.config, len(index))
    if dataset.texts is not None and plan.given != "labels":
        rng = np.random.default_rng([plan.seed, *index]) if plan.unseen_wordings else None
        text = torch.from_numpy(dataset.texts.draw(index, rng, unseen=plan.unseen_wordings))
    return labels, text


def round_to_8_bits(images: Tensor) -> Tensor:
    """Return pictures in [−1, 1] rounded to the values that a PNG can hold."""
    return (images * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1


def real_pictures(dataset: Dataset, decoder: PictureDecoder, rows: Sequence[int]) -> Iterator[Tensor]:
    """Yield examples of the data as pictures, in chunks (n, 3, H, W), rounded to eight bits.

    Latents are decoded, so the autoencoder's own errors are in them.
    """
    for start in range(0, len(rows), CHUNK):
        batch = torch.from_numpy(
            dataset.batch(np.array(rows[start : start + CHUNK]), np.random.default_rng(start))
        )
        yield round_to_8_bits(decoder.decode(batch) if isinstance(dataset, Latents) else batch)


def collect_sets(
    model: LoadedModel,
    decoder: PictureDecoder,
    dataset: Dataset,
    network: FeatureNetwork,
    plan: EvaluationPlan,
    rows: Mapping[str, Sequence[int]],
) -> dict[str, PictureSet]:
    """Return the sets to compare, of the examples of `choose_rows`, each with its features by `network`."""
    plans = {GENERATED: plan, UNSEEN: replace(plan, seed=plan.seed + len(rows[GENERATED]))}
    sets = {}
    with Progress(console=Console(stderr=True)) as progress:
        for name, index in rows.items():
            if name in plans:
                source = generate(model, decoder, dataset, index, plans[name])
            else:
                source = real_pictures(dataset, decoder, index)
            task = progress.add_task(name, total=len(index))
            chunks = []
            for chunk in source:
                chunks.append(chunk)
                progress.advance(task, len(chunk))
            images, labels = torch.cat(chunks), torch.from_numpy(dataset.labels[np.array(index)])
            sets[name] = PictureSet(images, labels, network.features(images))
    return sets
